"""The local background under a blob: a plane, fitted to the pixels around it."""

from array_api_compat import array_namespace, device

from pipeline.physics.arrays import Array

GUARD_PX = 3.5
CLIP_SIGMA = 2.5
ITERATIONS = 6


def plane_background(
    patch_BHW: Array, centre_xy_px: Array, usable_BHW: Array
) -> tuple[Array, Array]:
    """Background plane of each patch and the residual about it, from pixels outside the blob.

    patch_BHW counts; centre_xy_px (B, 2) of the blob in patch coordinates; usable_BHW bool, False
    for bad pixels. Pixels farther than GUARD_PX from the centre along either axis are fitted by
    least squares, those off by more than 2.5 sigma (a neighbouring target) dropped, five times:
    with two bright neighbours it takes that many until no more are dropped.
    → plane (B, H, W) counts, rms residual (B,) counts. A patch with fewer than 8 such pixels
    gets the mean of its usable pixels.
    """
    xp = array_namespace(patch_BHW)
    batch, height, width = patch_BHW.shape
    dtype = patch_BHW.dtype
    where = {"dtype": dtype, "device": device(patch_BHW)}
    x = xp.arange(width, **where)[None, None, :] + xp.zeros((batch, height, 1), **where)
    y = xp.arange(height, **where)[None, :, None] + xp.zeros((batch, 1, width), **where)
    dx = x - centre_xy_px[:, 0, None, None]
    dy = y - centre_xy_px[:, 1, None, None]
    outside = xp.maximum(xp.abs(dx), xp.abs(dy)) > GUARD_PX
    weight = xp.astype(outside & usable_BHW, dtype)
    enough = xp.sum(weight, axis=(1, 2)) >= 8
    weight = xp.where(enough[:, None, None], weight, xp.astype(usable_BHW, dtype))
    slope = xp.astype(enough, dtype)[:, None, None]
    ones = xp.ones_like(patch_BHW)
    basis = xp.stack([ones, dx * slope, dy * slope], axis=-1)
    basis = xp.reshape(basis, (batch, height * width, 3))
    values = xp.reshape(patch_BHW, (batch, height * width, 1))
    ridge = xp.eye(3, **where) * 1e-6  # keeps a patch without slope or pixels solvable
    weight = xp.reshape(weight, (batch, height * width, 1))
    for _ in range(ITERATIONS):
        weighted = xp.matrix_transpose(basis * weight)
        plane = basis @ xp.linalg.solve(weighted @ basis + ridge, weighted @ values)
        square = weight * (values - plane) ** 2
        freedom = xp.clip(xp.sum(weight, axis=(1, 2)) - 3.0, 1.0, None)
        rms = xp.sqrt(xp.sum(square, axis=(1, 2)) / freedom)
        near = square <= (CLIP_SIGMA * rms[:, None, None]) ** 2 + 1e-6
        weight = weight * xp.astype(near, dtype)
    return xp.reshape(plane, (batch, height, width)), rms
