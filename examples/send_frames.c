/* Send frames to a pipeline: libzmq is enough, the MessagePack header is written by hand.
 *
 *   cc -O2 examples/send_frames.c -o send_frames -lzmq
 *   ./send_frames tcp://127.0.0.1:5557 1000
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

enum { WIDTH = 640, HEIGHT = 512 };
static uint8_t header[256], *at;
static uint16_t pixels[HEIGHT * WIDTH]; /* row by row, little-endian as on nearly every machine */

static void text(const char *s) { /* shorter than 32 bytes */
    *at++ = (uint8_t)(0xa0 | strlen(s));
    memcpy(at, s, strlen(s));
    at += strlen(s);
}

static void number(uint64_t n, int bytes) { /* big-endian; 2 bytes: uint16, 8 bytes: uint64 */
    *at++ = bytes == 2 ? 0xcd : 0xcf;
    while (bytes--) *at++ = (uint8_t)(n >> (8 * bytes));
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: send_frames ENDPOINT COUNT\n"), 2;
    void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_PUSH);
    if (zmq_connect(socket, argv[1])) return perror(argv[1]), 1;
    for (uint64_t seq = 0; seq < strtoull(argv[2], NULL, 10); seq++) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        for (int i = 0; i < WIDTH * HEIGHT; i++) pixels[i] = (uint16_t)(1000 + rand() % 16);
        at = header;
        *at++ = 0x86; /* a map of six */
        text("schema"), text("irst.frame/1");
        text("seq"), number(seq, 8);
        text("t_exposure_ns"), number((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec, 8);
        text("clock"), text("utc");
        text("dtype"), text("uint16");
        text("shape"), *at++ = 0x92, number(HEIGHT, 2), number(WIDTH, 2); /* an array of two */
        zmq_send(socket, header, (size_t)(at - header), ZMQ_SNDMORE);
        zmq_send(socket, pixels, sizeof pixels, 0);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    zmq_close(socket); /* what is queued still leaves before the context ends */
    return zmq_ctx_term(context);
}
