/* A camera of Video4Linux in user space, for OpenCV's own V4L2 code to run against, preloaded:
 *
 *   cc -shared -fPIC -o fake.so fake_v4l2.c && LD_PRELOAD=./fake.so FAKE_V4L2=y16 python ...
 *
 * /dev/video-fake is then a camera of 64 x 48 pixels that gives a frame every 5 ms. FAKE_V4L2 says
 * which: "y16" and "yuyv" offer that format only, "both" YUYV and Y16; "busy" is held by another
 * program, "silent" gives no frame, "unplugged" goes away after five frames and is back at once.
 * Pixel i of frame n is (1021 n + i) mod 2^16 in Y16, and 16 + (n + i) mod 200 in YUYV, grey.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 48, SIZE = 2 * WIDTH * HEIGHT, ROOM = 8192, BUFFERS = 4 };

static int camera = -1, frames, first, waiting, queue[BUFFERS];
static unsigned format = V4L2_PIX_FMT_YUYV;

static int is(const char *kind)
{
    const char *wanted = getenv("FAKE_V4L2");
    return wanted && strcmp(wanted, kind) == 0;
}

static int fail(int error)
{
    errno = error;
    return -1;
}

static int offers(unsigned wanted)
{
    if (wanted == V4L2_PIX_FMT_Y16)
        return !is("yuyv");
    return wanted == V4L2_PIX_FMT_YUYV && (is("yuyv") || is("both"));
}

static void draw(unsigned char *pixels, int number)
{
    for (int i = 0; i < WIDTH * HEIGHT; i++) {
        unsigned y16 = 1021 * number + i;
        pixels[2 * i] = format == V4L2_PIX_FMT_Y16 ? y16 & 255 : 16u + (number + i) % 200;
        pixels[2 * i + 1] = format == V4L2_PIX_FMT_Y16 ? y16 >> 8 & 255 : 128;
    }
}

static int set_format(struct v4l2_format *wanted)
{
    struct v4l2_pix_format *pix = &wanted->fmt.pix;
    if (is("busy"))
        return fail(EBUSY);
    if (offers(pix->pixelformat))
        format = pix->pixelformat; /* else it stays, as drivers do it */
    else if (!offers(format))
        format = V4L2_PIX_FMT_Y16;
    *pix = (struct v4l2_pix_format){.width = WIDTH, .height = HEIGHT, .pixelformat = format,
        .field = V4L2_FIELD_NONE, .bytesperline = 2 * WIDTH, .sizeimage = SIZE};
    return 0;
}

static int give(struct v4l2_buffer *buffer)
{
    if (is("silent") || !waiting)
        return fail(EAGAIN);
    if (is("unplugged") && frames == first + 5)
        return fail(ENODEV);
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    buffer->index = queue[0];
    memmove(queue, queue + 1, --waiting * sizeof *queue);
    unsigned char *pixels = mmap(NULL, SIZE, PROT_WRITE, MAP_SHARED, camera, buffer->index * ROOM);
    draw(pixels, frames++);
    munmap(pixels, SIZE);
    buffer->length = buffer->bytesused = SIZE;
    return 0;
}

static int answer(unsigned long request, void *argument)
{
    struct v4l2_buffer *buffer = argument;
    switch (request) {
    case VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)argument)->capabilities = V4L2_CAP_VIDEO_CAPTURE;
        return 0;
    case VIDIOC_G_FMT:
    case VIDIOC_S_FMT:
        return request == VIDIOC_G_FMT ? 0 : set_format(argument);
    case VIDIOC_S_PARM:
        return 0;
    case VIDIOC_G_PARM:
        ((struct v4l2_streamparm *)argument)->parm.capture.timeperframe =
            (struct v4l2_fract){1, 200};
        return 0;
    case VIDIOC_REQBUFS:
        waiting = 0;
        if (((struct v4l2_requestbuffers *)argument)->count > BUFFERS)
            ((struct v4l2_requestbuffers *)argument)->count = BUFFERS;
        return 0;
    case VIDIOC_QUERYBUF:
        buffer->length = SIZE;
        buffer->m.offset = buffer->index * ROOM;
        return 0;
    case VIDIOC_QBUF:
        queue[waiting++] = buffer->index;
        return 0;
    case VIDIOC_DQBUF:
        return give(buffer);
    case VIDIOC_STREAMON:
        first = frames;
        return 0;
    case VIDIOC_STREAMOFF:
        return 0;
    }
    return fail(EINVAL);
}

static int opened(const char *name, const char *path, int flags, mode_t mode)
{
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
    if (!getenv("FAKE_V4L2") || strcmp(path, "/dev/video-fake") != 0)
        return real(path, flags, mode);
    int memory = memfd_create("camera", 0);
    if (memory >= 0 && ftruncate(memory, BUFFERS * ROOM) == 0)
        camera = memory;
    return memory;
}

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened("open64", path, flags, mode);
}

int ioctl(int descriptor, unsigned long request, ...)
{
    int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return descriptor == camera ? answer(request, argument) : real(descriptor, request, argument);
}

int select(int highest, fd_set *read, fd_set *write, fd_set *others, struct timeval *limit)
{
    int (*real)(int, fd_set *, fd_set *, fd_set *, struct timeval *) = dlsym(RTLD_NEXT, "select");
    if (camera < 0 || !read || !FD_ISSET(camera, read) || !is("silent"))
        return real(highest, read, write, others, limit);
    return real(0, NULL, NULL, NULL, limit); /* nothing comes in that time */
}
