/* The innermost loops of shards, in plain C without Python's headers: called through ctypes, without the interpreter lock.
 *
 * Each has a Python twin that gives the same bytes (`loops.py`, `tar_builder.py`); tests compare the two. Callers pass buffers that are large enough. x86-64 Linux with
 * SHA extensions (Intel since 2019, AMD since 2017) only. What is called from Python is named `aecore_...`; this is what the files share.
 */

#ifndef AECORE_NATIVE_H
#define AECORE_NATIVE_H
#include <stdint.h>
#include <sys/stat.h>

#if defined(__x86_64__) && defined(__linux__)
#define HERE
#endif
#define SHARED __attribute__((visibility("hidden")))

enum { VERSION = 15, BLOCK = 512, STATE = 50 };

typedef struct {
    uint8_t kind, detail[3]; /* 0: for Python, which reports damage and knows more formats; 1 PNG, 2 JPEG */
    uint32_t width, height;
} Facts;

/* Return the facts of a file; files with equal facts have equal headers. */
SHARED Facts examine(const uint8_t *file, int64_t size);

/* Read from the start of a file to its end. Return its size, -1 if it cannot be read, -2 if it is larger than `room`, -3 if `wait` is 0 and
 * some of it has to come from the disk first.
 *
 * `expected` saves the read that finds nothing more: a read that gave so much, could have given more and ended inside a page has met the end. */
SHARED int64_t read_whole(int file, uint8_t *buffer, int64_t room, int64_t expected, int wait);

/* Write the state of a file, STATE characters (`local_state` in store/_states.py); return when it was changed last, in ns since 1970. */
SHARED int64_t write_state(const struct stat *found, char *state);

/* Hash `n` messages into 32 bytes each of `digests`, and at the same time `blocks` blocks of 64 bytes of a stream into its `state`. The messages
 * are at [begins[i], ends[i]) of something whose byte `origin` is the first of `data`. */
SHARED void hash_beside(uint32_t *state, const uint8_t *stream, int64_t blocks, const uint8_t *data, int64_t origin, const int64_t *begins,
                        const int64_t *ends, int64_t n, uint8_t *digests);

/* Return the bytes that a member of `size` bytes takes, header and padding included. */
SHARED int64_t stored_size(int64_t size);

/* Write all but the data of a sample whose first header is at `buffer`: its members are sorted by extension, and a label that is
 * not negative adds `cls`. Return the address of the data. `name` has a dot and at most 96 bytes. */
SHARED uint8_t *frame_sample(uint8_t *buffer, const uint8_t *blank, const char *name, int32_t label, int64_t size);

#endif
