/* blake2b (RFC 7693) with a digest of 8 bytes, of many short messages that begin with the same bytes: what orders samples and splits them. */

#define _GNU_SOURCE
#include "native.h"

#ifdef HERE
#include <string.h>

enum { WIDE = 128 };

static const uint64_t START[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
static const uint8_t ORDER[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

static inline uint64_t turned(uint64_t word, int bits) { return word >> bits | word << (64 - bits); }

#define MIX(a, b, c, d, x, y) \
    do { \
        v[a] += v[b] + (x), v[d] = turned(v[d] ^ v[a], 32), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 24); \
        v[a] += v[b] + (y), v[d] = turned(v[d] ^ v[a], 16), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 63); \
    } while (0)

static void compress(uint64_t state[8], const uint8_t block[WIDE], uint64_t total, int is_last) {
    uint64_t v[16], words[16];
    memcpy(words, block, WIDE);
    memcpy(v, state, 64);
    memcpy(v + 8, START, 64);
    v[12] ^= total;
    if (is_last) v[14] = ~v[14];
#pragma GCC unroll 12
    for (int round = 0; round < 12; round++) {
        const uint8_t *at = ORDER[round % 10];
        MIX(0, 4, 8, 12, words[at[0]], words[at[1]]);
        MIX(1, 5, 9, 13, words[at[2]], words[at[3]]);
        MIX(2, 6, 10, 14, words[at[4]], words[at[5]]);
        MIX(3, 7, 11, 15, words[at[6]], words[at[7]]);
        MIX(0, 5, 10, 15, words[at[8]], words[at[9]]);
        MIX(1, 6, 11, 12, words[at[10]], words[at[11]]);
        MIX(2, 7, 8, 13, words[at[12]], words[at[13]]);
        MIX(3, 4, 9, 14, words[at[14]], words[at[15]]);
    }
    for (int i = 0; i < 8; i++) state[i] ^= v[i] ^ v[i + 8];
}

/* Hash `prefix` (`length` bytes, fewer than a block) followed by each of `n` messages, which are at [ends[i], ends[i + 1]) of `data`. */
void aecore_blake2b(const uint8_t *prefix, int64_t length, const uint8_t *data, const int32_t *ends, int64_t n, uint64_t *digests) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t state[8], total = 0;
        uint8_t block[WIDE];
        const uint8_t *rest = data + ends[i];
        int64_t size = ends[i + 1] - ends[i], filled = length;
        memcpy(state, START, 64);
        state[0] ^= 0x01010000 ^ 8; /* one lane, no key, 8 bytes */
        memcpy(block, prefix, (size_t)length);
        while (filled + size > WIDE) { /* the last block is compressed below, even if it is full */
            int64_t part = WIDE - filled;
            memcpy(block + filled, rest, (size_t)part);
            compress(state, block, total += WIDE, 0);
            rest += part, size -= part, filled = 0;
        }
        memcpy(block + filled, rest, (size_t)size);
        memset(block + filled + size, 0, (size_t)(WIDE - filled - size));
        compress(state, block, total + (uint64_t)(filled + size), 1);
        digests[i] = state[0];
    }
}

#endif
