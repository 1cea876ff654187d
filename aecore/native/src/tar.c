/* Members of a tar (USTAR), as aecore/data/format/tar.py writes them. */

#define _GNU_SOURCE
#include "native.h"

#ifdef HERE
#include <string.h>

enum { NAME = 100, SIZE_AT = 124, SUM_AT = 148 };

static void write_octal(uint8_t *field, int64_t value, int digits) {
    for (; digits--; value >>= 3) field[digits] = (uint8_t)('0' + (value & 7));
}

int64_t stored_size(int64_t size) { return BLOCK + size + (-size & (BLOCK - 1)); }

/* Write the frame of the `size` bytes of a member: before them a copy of the header `blank` with name, size and checksum, after them
 * zeros up to a full block. */
static void frame_member(uint8_t *buffer, const uint8_t *blank, const char *name, size_t name_size, int64_t size) {
    uint32_t sum = 0;
    memcpy(buffer, blank, BLOCK);
    memcpy(buffer, name, name_size);
    write_octal(buffer + SIZE_AT, size, 11);
    for (int at = 0; at < BLOCK; at++) sum += buffer[at];
    write_octal(buffer + SUM_AT, sum, 6);
    buffer[SUM_AT + 6] = 0;
    memset(buffer + BLOCK + size, 0, (size_t)(-size & (BLOCK - 1)));
}

/* Write the member `cls` of a sample, which holds the digits of its label; `name` is that of another member. */
static void write_label(uint8_t *buffer, const uint8_t *blank, const char *name, int32_t label) {
    size_t stem = (size_t)(strrchr(name, '.') + 1 - name);
    char cls[NAME], digits[12];
    int size = 0;
    memcpy(cls, name, stem);
    memcpy(cls + stem, "cls", 3);
    for (int32_t rest = label; rest || !size; rest /= 10) digits[11 - size++] = (char)('0' + rest % 10);
    memcpy(buffer + BLOCK, digits + 12 - size, (size_t)size);
    frame_member(buffer, blank, cls, stem + 3, size);
}

uint8_t *frame_sample(uint8_t *buffer, const uint8_t *blank, const char *name, int32_t label, int64_t size) {
    uint8_t *member = label >= 0 && strcmp(strrchr(name, '.') + 1, "cls") > 0 ? buffer + 2 * BLOCK : buffer;
    frame_member(member, blank, name, strlen(name), size);
    if (label >= 0) write_label(member == buffer ? buffer + stored_size(size) : buffer, blank, name, label);
    return member + BLOCK;
}

/* Write `n` samples one after the other: the data at [begins[i], ends[i]) under its zero-terminated name, and its label.
 * `blank` has spaces in its checksum field. */
void aecore_pack(uint8_t *buffer, const uint8_t *blank, const char *names, const uint8_t *data, const int64_t *begins, const int64_t *ends,
                 const int32_t *labels, int64_t n) {
    for (int64_t i = 0; i < n; i++, names += strlen(names) + 1) {
        int64_t size = ends[i] - begins[i];
        memcpy(frame_sample(buffer, blank, names, labels[i], size), data + begins[i], (size_t)size);
        buffer += stored_size(size) + (labels[i] >= 0 ? 2 * BLOCK : 0);
    }
}

#endif
