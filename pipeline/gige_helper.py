"""Reads a GigE Vision camera through Aravis and writes what comes to standard output.

A program of its own, run by the Python that has PyGObject (the system's); it imports nothing of
ours. Its argument is a map of options as JSON, see `sources/gige.py`. It writes messages: two
little-endian uint32, the lengths of what follows, a map as JSON, and a frame's bytes. Events:
"camera" (once), "frame", "lost" (with the frame's number and why), "gone", "failed" (with why, and
whether the camera is there and refuses).
"""

import json
import os
import struct
import sys
from typing import Any, BinaryIO

BUFFERS = 32
POP_US = 200_000
EXIT_GONE, EXIT_FAILED = 3, 2
AWAY = ("NOT_CONNECTED", "PROTOCOL_ERROR", "TRANSFER_ERROR", "TIMEOUT", "NOT_FOUND")


def main() -> int:
    """Open the camera and stream until it vanishes or nobody reads any more."""
    options = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        os.dup2(2, 1)  # whatever a library prints is not part of the stream
        try:
            import gi

            gi.require_version("Aravis", "0.8")
            from gi.repository import Aravis, GLib
        except (ImportError, ValueError) as error:
            remedy = "install Debian's gir1.2-aravis-0.8 and python3-gi"
            send(out, {"event": "failed", "reason": f"no Aravis for Python ({error}); {remedy}"})
            return EXIT_FAILED
        here = False
        try:
            camera = Aravis.Camera.new(options["camera"] or first_address(Aravis))
            here = True
            described = configure(camera, options)
            send(out, {"event": "camera", **described})
            return 0 if options["probe"] else stream(Aravis, camera, options, out)
        except (GLib.Error, ValueError) as error:
            here = here and not is_away(Aravis, error)
            reason = getattr(error, "message", str(error))
            send(out, {"event": "failed", "reason": reason, "here": here})
            return EXIT_FAILED
        except BrokenPipeError:
            return 0


def send(out: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    """One message; raises BrokenPipeError if nobody reads."""
    packed = json.dumps(header).encode()
    rest = memoryview(struct.pack("<II", len(packed), len(payload)) + packed)
    for part in (rest, memoryview(payload)):
        while part:
            part = part[out.write(part) :]


def is_away(aravis: Any, error: Exception) -> bool:
    """True if it is that the camera does not answer, not that it refuses what it is told."""
    if not hasattr(error, "matches"):
        return False
    codes = (getattr(aravis.DeviceError, name) for name in AWAY)
    return any(error.matches(aravis.device_error_quark(), code) for code in codes)


def first_address(aravis: Any) -> str:
    """Of the first GigE camera that answers; raises ValueError if none does.

    By its address the camera is then reached over the interface that leads there.
    """
    aravis.update_device_list()
    for index in range(aravis.get_n_devices()):
        if aravis.get_device_protocol(index) == "GigEVision":
            return str(aravis.get_device_address(index))
    raise ValueError("none answers; check cable and network, or give source.camera its address")


def configure(camera: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Set what was asked for; returns what the camera then says of itself.

    It may still stream to a helper that died: that is ended first.
    """
    camera.stop_acquisition()
    if options["pixel_format"]:
        camera.set_pixel_format_from_string(options["pixel_format"])
    if options["width"] or options["height"]:
        width, height = size(camera)
        camera.set_region(
            options["x"], options["y"], options["width"] or width, options["height"] or height
        )
    for name in ("frame_rate", "exposure_time", "gain"):
        if options[name] is None:
            continue
        lowest, highest = getattr(camera, f"get_{name}_bounds")()
        if not lowest <= options[name] <= highest:
            raise ValueError(
                f"{name} must be from {lowest:g} to {highest:g}, got {options[name]:g}"
            )
        getattr(camera, f"set_{name}")(options[name])
    width, height = size(camera)
    return {
        "model": f"{camera.get_vendor_name()} {camera.get_model_name()}",
        "pixel_format": camera.get_pixel_format_as_string(),
        "width": width,
        "height": height,
        "exposure_us": camera.get_exposure_time() if camera.is_exposure_time_available() else 0.0,
    }


def size(camera: Any) -> tuple[int, int]:
    """Width and height of the frames."""
    region = camera.get_region()
    return region.width, region.height


def stream(aravis: Any, camera: Any, options: dict[str, Any], out: BinaryIO) -> int:
    """Frames until the camera vanishes; returns the exit code."""
    gone: list[bool] = []
    device = camera.get_device()
    device.connect("control-lost", lambda _device: gone.append(True))
    if camera.is_gv_device():
        if options["packet_size"]:
            camera.gv_set_packet_size(options["packet_size"])
        else:
            camera.gv_auto_packet_size()
    source = camera.create_stream(None, None)
    if not options["resend"]:
        source.set_property("packet-resend", aravis.GvStreamPacketResend.NEVER)
    payload = camera.get_payload()
    for _ in range(BUFFERS):
        source.push_buffer(aravis.Buffer.new_allocate(payload))
    parent = os.getppid()
    camera.start_acquisition()
    try:
        while not gone and os.getppid() == parent:
            buffer = source.timeout_pop_buffer(POP_US)
            if buffer is not None:
                pass_on(aravis, buffer, out)
                source.push_buffer(buffer)
    finally:
        if not gone:
            camera.stop_acquisition()
    if gone:
        send(out, {"event": "gone", "reason": "the camera no longer answers"})
        return EXIT_GONE
    return 0


def pass_on(aravis: Any, buffer: Any, out: BinaryIO) -> None:
    """A frame that is complete, or word that it is not."""
    status = buffer.get_status()
    header: dict[str, Any] = {"event": "lost", "number": buffer.get_frame_id()}
    if status != aravis.BufferStatus.SUCCESS:
        send(out, header | {"reason": status.value_nick})
        return
    device_ns = buffer.get_timestamp()
    header |= {
        "event": "frame",
        "t_ns": device_ns or buffer.get_system_timestamp(),
        "clock": "camera" if device_ns else "utc",
        "width": buffer.get_image_width(),
        "height": buffer.get_image_height(),
    }
    send(out, header, buffer.get_data())


if __name__ == "__main__":
    sys.exit(main())
