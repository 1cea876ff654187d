/* The innermost loops of shards, in plain C without Python's headers: called through ctypes, so the interpreter is free meanwhile.
 *
 * What they do is done in Python too, with the same bytes; tests compare the two. Callers pass buffers that are large enough. x86-64 with
 * SHA extensions (Intel since 2019, AMD since 2017) only.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>

enum { VERSION = 6, BLOCK = 512, NAME = 100, SIZE_AT = 124, SUM_AT = 148, MOST_WAITING = 32 };

/* ---- sha256 (FIPS 180-4) with the processor's own instructions, two messages at a time --------------------------------------------
 *
 * A round waits for the round before, so one message leaves half of the unit idle; a second one fills it (1.5 times the bytes per second).
 * Where there is AVX-512, 16 messages go through the ordinary vector units instead, which one message in the other unit hardly disturbs.
 */
#define SHA __attribute__((target("sha,sse4.1,ssse3")))
#define INLINE static inline __attribute__((always_inline)) SHA

static const uint32_t K[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
static const uint32_t START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

typedef struct {
    __m128i abef, cdgh; /* the eight working variables, as the instructions want them */
    __m128i words[4];   /* 16 words of the message schedule */
} Rounds;

INLINE void load_state(Rounds *lane, const uint32_t state[8]) {
    __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
    __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
    lane->abef = _mm_alignr_epi8(low, high, 8);
    lane->cdgh = _mm_blend_epi16(high, low, 0xF0);
}

INLINE void store_state(const Rounds *lane, uint32_t state[8]) {
    __m128i low = _mm_shuffle_epi32(lane->abef, 0x1B), high = _mm_shuffle_epi32(lane->cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(low, high, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(high, low, 8));
}

INLINE void load_words(Rounds *lane, const uint8_t *block) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    for (int i = 0; i < 4; i++) lane->words[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(block + 16 * i)), big_endian);
}

INLINE void four_rounds(Rounds *lane, int step) {
    __m128i *w = lane->words, *now = &w[step & 3], next = w[(step + 1) & 3], third = w[(step + 2) & 3], last = w[(step + 3) & 3];
    __m128i keyed = _mm_add_epi32(*now, _mm_load_si128((const __m128i *)&K[4 * step]));
    lane->cdgh = _mm_sha256rnds2_epu32(lane->cdgh, lane->abef, keyed);
    lane->abef = _mm_sha256rnds2_epu32(lane->abef, lane->cdgh, _mm_shuffle_epi32(keyed, 0x0E));
    if (step < 12) *now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(*now, next), _mm_alignr_epi8(last, third, 4)), last);
}

INLINE void add_state(Rounds *lane, __m128i abef, __m128i cdgh) {
    lane->abef = _mm_add_epi32(lane->abef, abef);
    lane->cdgh = _mm_add_epi32(lane->cdgh, cdgh);
}

INLINE void compress_one(Rounds *lane, const uint8_t *block) {
    __m128i abef = lane->abef, cdgh = lane->cdgh;
    load_words(lane, block);
#pragma GCC unroll 16
    for (int step = 0; step < 16; step++) four_rounds(lane, step);
    add_state(lane, abef, cdgh);
}

SHA static void compress(uint32_t state[8], const uint8_t *data, int64_t blocks) {
    Rounds lane;
    load_state(&lane, state);
    for (; blocks; blocks--, data += 64) compress_one(&lane, data);
    store_state(&lane, state);
}

SHA static void compress_two(uint32_t state[8], const uint8_t *data, uint32_t state2[8], const uint8_t *data2, int64_t blocks) {
    Rounds lane, lane2;
    load_state(&lane, state);
    load_state(&lane2, state2);
    for (; blocks; blocks--, data += 64, data2 += 64) {
        __m128i abef = lane.abef, cdgh = lane.cdgh, abef2 = lane2.abef, cdgh2 = lane2.cdgh;
        load_words(&lane, data);
        load_words(&lane2, data2);
#pragma GCC unroll 16
        for (int step = 0; step < 16; step++) {
            four_rounds(&lane, step);
            four_rounds(&lane2, step);
        }
        add_state(&lane, abef, cdgh);
        add_state(&lane2, abef2, cdgh2);
    }
    store_state(&lane, state);
    store_state(&lane2, state2);
}

#define WIDE static inline __attribute__((always_inline, target("avx512f,avx512bw,sha,sse4.1,ssse3")))
enum { LANES = 16 };

typedef struct {
    uint32_t state[8][LANES]; /* each row one working variable of all messages */
} __attribute__((aligned(64))) States;

/* Give row `i` of `words` word i of the 64 bytes at every `at`: a transposition in four steps. */
WIDE void load_all(__m512i words[16], const uint8_t *const at[LANES]) {
    const __m512i big_endian = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203));
    __m512i one[16], two[16];
    for (int i = 0; i < 16; i++) one[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(at[i]), big_endian);
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(one[i], one[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(one[i], one[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        one[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
        one[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
        one[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
        one[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        two[i] = _mm512_shuffle_i32x4(one[i], one[i + 4], 0x88);
        two[i + 4] = _mm512_shuffle_i32x4(one[i], one[i + 4], 0xDD);
        two[i + 8] = _mm512_shuffle_i32x4(one[i + 8], one[i + 12], 0x88);
        two[i + 12] = _mm512_shuffle_i32x4(one[i + 8], one[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; i++) {
        words[i] = _mm512_shuffle_i32x4(two[i], two[i + 8], 0x88);
        words[i + 8] = _mm512_shuffle_i32x4(two[i], two[i + 8], 0xDD);
    }
}

WIDE __m512i xor3(__m512i x, __m512i y, __m512i z) { return _mm512_ternarylogic_epi32(x, y, z, 0x96); }

WIDE void round_of_all(__m512i state[8], __m512i words[16], int round) {
    __m512i *now = &words[round & 15], *h = &state[7 - (round & 7)], *d = &state[(11 - (round & 7)) & 7];
    if (round >= 16) {
        __m512i x = words[(round + 1) & 15], y = words[(round + 14) & 15];
        x = xor3(_mm512_ror_epi32(x, 7), _mm512_ror_epi32(x, 18), _mm512_srli_epi32(x, 3));
        y = xor3(_mm512_ror_epi32(y, 17), _mm512_ror_epi32(y, 19), _mm512_srli_epi32(y, 10));
        *now = _mm512_add_epi32(_mm512_add_epi32(*now, x), _mm512_add_epi32(words[(round + 9) & 15], y));
    }
    __m512i a = state[-round & 7], b = state[(1 - round) & 7], c = state[(2 - round) & 7];
    __m512i e = state[(4 - round) & 7], f = state[(5 - round) & 7], g = state[(6 - round) & 7];
    __m512i chosen = _mm512_ternarylogic_epi32(e, f, g, 0xCA), most = _mm512_ternarylogic_epi32(a, b, c, 0xE8);
    __m512i of_e = xor3(_mm512_ror_epi32(e, 6), _mm512_ror_epi32(e, 11), _mm512_ror_epi32(e, 25));
    __m512i of_a = xor3(_mm512_ror_epi32(a, 2), _mm512_ror_epi32(a, 13), _mm512_ror_epi32(a, 22));
    __m512i keyed = _mm512_add_epi32(*now, _mm512_set1_epi32((int)K[round]));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(*h, keyed), _mm512_add_epi32(of_e, chosen));
    *d = _mm512_add_epi32(*d, sum);
    *h = _mm512_add_epi32(sum, _mm512_add_epi32(of_a, most));
}

/* Hash `blocks` blocks of 16 messages, and beside each block 16 of a stream, if there is one. */
__attribute__((target("avx512f,avx512bw,sha,sse4.1,ssse3"))) static void compress_all(States *states, const uint8_t *at[LANES], int64_t blocks,
                                                                                     uint32_t *stream_state, const uint8_t *stream) {
    Rounds lane;
    __m512i state[8], before[8], words[16];
    for (int i = 0; i < 8; i++) state[i] = _mm512_load_si512(states->state[i]);
    if (stream) load_state(&lane, stream_state);
    for (; blocks; blocks--) {
        load_all(words, at);
        for (int i = 0; i < LANES; i++) at[i] += 64;
        for (int i = 0; i < 8; i++) before[i] = state[i];
        for (int round = 0; round < 64; round += 8) {
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) round_of_all(state, words, round + k);
            for (int k = 0; stream && k < 2; k++, stream += 64) compress_one(&lane, stream);
        }
        for (int i = 0; i < 8; i++) state[i] = _mm512_add_epi32(state[i], before[i]);
    }
    for (int i = 0; i < 8; i++) _mm512_store_si512(states->state[i], state[i]);
    if (stream) store_state(&lane, stream_state);
}

static int has_wide; /* AVX-512 */

typedef struct {
    uint32_t own[8], *state;   /* of a message, or the caller's */
    const uint8_t *data;       /* what is hashed next */
    int64_t blocks;            /* whole ones there */
    uint8_t end[128], *digest; /* last bytes of a message with its padding; where its digest goes, NULL where there is none to come */
    int64_t end_blocks;
} Job;

static void begin_message(Job *job, const uint8_t *data, int64_t size, uint8_t *digest) {
    int64_t rest = size % 64;
    memcpy(job->own, START, sizeof START);
    job->state = job->own;
    job->data = data;
    job->blocks = size / 64;
    job->end_blocks = rest < 56 ? 1 : 2;
    job->digest = digest;
    memset(job->end, 0, sizeof job->end);
    memcpy(job->end, data + size - rest, (size_t)rest);
    job->end[rest] = 0x80;
    for (int i = 0; i < 8; i++) job->end[64 * job->end_blocks - 1 - i] = (uint8_t)((uint64_t)size * 8 >> 8 * i);
}

static void finish_message(Job *job) {
    for (int i = 0; job->digest && i < 32; i++) job->digest[i] = (uint8_t)(job->state[i / 4] >> (24 - 8 * (i % 4)));
}

/* Go on to the last bytes of a message with their padding. Return 0 if these are hashed too: the message is finished. */
static int go_on(Job *job) {
    if (job->blocks) return 1;
    if (!job->end_blocks) return 0;
    job->data = job->end;
    job->blocks = job->end_blocks;
    job->end_blocks = 0;
    return 1;
}

/* Hash messages, and the stream beside them, as long as there are 16 of them; leave `jobs` half done. Return how many were begun. */
static int64_t hash_many(Job jobs[LANES], Job *stream, const uint8_t *data, int64_t origin, const int64_t *begins, const int64_t *ends,
                         int64_t n, uint8_t *digests) {
    States states = {0};
    const uint8_t *at[LANES];
    int64_t next = 0;
    if (n < 2 * LANES || !has_wide) return 0;
    for (int k = 0; k < LANES; k++) jobs[k].blocks = jobs[k].end_blocks = 0, jobs[k].digest = NULL;
    for (;;) {
        int64_t count = INT64_MAX;
        for (int k = 0; k < LANES; k++) {
            if (!go_on(&jobs[k])) {
                for (int i = 0; i < 8; i++) jobs[k].own[i] = states.state[i][k];
                if (jobs[k].digest) finish_message(&jobs[k]);
                jobs[k].digest = NULL;
                if (next == n) goto out;
                begin_message(&jobs[k], data + (begins[next] - origin), ends[next] - begins[next], digests + 32 * next);
                next++;
                for (int i = 0; i < 8; i++) states.state[i][k] = START[i];
                go_on(&jobs[k]);
            }
            at[k] = jobs[k].data;
            if (jobs[k].blocks < count) count = jobs[k].blocks;
        }
        int64_t beside = stream->blocks / LANES < count ? stream->blocks / LANES : count; /* what the stream has left */
        if (beside) compress_all(&states, at, beside, stream->state, stream->data);
        else compress_all(&states, at, beside = count, NULL, NULL);
        int64_t of_stream = stream->blocks / LANES ? LANES * beside : 0;
        stream->data += 64 * of_stream;
        stream->blocks -= of_stream;
        for (int k = 0; k < LANES; k++) jobs[k].data += 64 * beside, jobs[k].blocks -= beside;
    }
out:
    for (int k = 0; k < LANES; k++)
        for (int i = 0; jobs[k].digest && i < 8; i++) jobs[k].own[i] = states.state[i][k];
    return next;
}

/* Hash `n` messages into 32 bytes each of `digests`, and beside them `blocks` blocks of 64 bytes of a stream into its `state`. The messages
 * stand at [begins[i], ends[i]) of something whose byte `origin` is the first of `data`. */
static void hash_beside(uint32_t *state, const uint8_t *stream, int64_t blocks, const uint8_t *data, int64_t origin, const int64_t *begins,
                        const int64_t *ends, int64_t n, uint8_t *digests) {
    Job many[LANES], own = {.state = state, .data = stream, .blocks = blocks}, jobs[2], *busy[2] = {blocks ? &own : NULL, NULL};
    int64_t next = hash_many(many, &own, data, origin, begins, ends, n, digests);
    int begun = next ? 0 : LANES; /* of those that were left half done */
    for (;;) {
        for (int k = 0; k < 2; k++) {
            if (busy[k] && !go_on(busy[k])) {
                finish_message(busy[k]);
                busy[k] = NULL;
            }
            while (!busy[k] && begun < LANES) {
                if (many[begun].digest) busy[k] = &many[begun];
                begun++;
            }
            if (!busy[k] && next < n) {
                busy[k] = &jobs[k];
                begin_message(busy[k], data + (begins[next] - origin), ends[next] - begins[next], digests + 32 * next);
                next++;
            }
            if (busy[k]) go_on(busy[k]);
        }
        if (!busy[0] && !busy[1]) return;
        Job *one = busy[0] ? busy[0] : busy[1], *other = busy[0] ? busy[1] : NULL;
        int64_t count = one->blocks;
        if (other) {
            if (other->blocks < count) count = other->blocks;
            compress_two(one->state, one->data, other->state, other->data, count);
            other->data += 64 * count;
            other->blocks -= count;
        } else {
            compress(one->state, one->data, count);
        }
        one->data += 64 * count;
        one->blocks -= count;
    }
}

void aecore_sha256(uint32_t *state, const uint8_t *stream, int64_t blocks, const uint8_t *data, const int64_t *begins, const int64_t *ends,
                   int64_t n, uint8_t *digests) {
    hash_beside(state, stream, blocks, data, 0, begins, ends, n, digests);
}

/* ---- files ------------------------------------------------------------------------------------------------------------------------- */

/* Read from the start of a file to its end. Return its size, -1 if it cannot be read, -2 if it is larger than `room`, -3 if `wait` is 0 and
 * some of it has to come from the disk first.
 *
 * `expected` saves the read that finds nothing more: a read that gave so much, could have given more and ended inside a page has met the end. */
static int64_t read_whole(int file, uint8_t *buffer, int64_t room, int64_t expected, int wait) {
    int64_t size = 0;
    while (size < room) {
        struct iovec piece = {buffer + size, (size_t)(room - size)};
        ssize_t got = wait ? pread(file, piece.iov_base, piece.iov_len, size) : preadv2(file, &piece, 1, size, RWF_NOWAIT);
        if (got == 0 || (got == expected && got < room && size == 0 && got % 4096 != 0)) return size + got;
        if (got > 0) size += got;
        else if (!wait && errno == EAGAIN) return -3;
        else if (!wait && errno == EOPNOTSUPP) wait = 1;
        else if (errno != EINTR) return -1;
    }
    return -2;
}

/* Read [offsets[i], offsets[i] + ends[i] - begins[i]) of a file into [begins[i], ends[i]) of `buffer`, for each of `n` pieces; `ends` becomes
 * where the bytes end if the file has fewer. Return 0, or the number of the error. */
int64_t aecore_read_pieces(int file, const int64_t *offsets, int64_t n, uint8_t *buffer, const int64_t *begins, int64_t *ends) {
    for (int64_t i = 0; i < n; i++) {
        int64_t at = begins[i];
        while (at < ends[i]) {
            ssize_t got = pread(file, buffer + at, (size_t)(ends[i] - at), offsets[i] + at - begins[i]);
            if (got > 0) at += got;
            else if (got == 0) ends[i] = at;
            else if (errno != EINTR) return errno;
        }
    }
    return 0;
}

static int by_name(const void *one, const void *other) { return strcmp(*(char *const *)one, *(char *const *)other); }

/* List an open folder, sorted: names into `names`, each ended by a zero byte, and into `sizes` the bytes of regular files, -1 for everything
 * else. `room` is as large as `names`, `order` has a place for each of `most` names.
 *
 * Return the bytes of all names, or -1 if they do not fit (`capacity` bytes of names, `most` of them), or -2 if the folder cannot be read. */
int64_t aecore_list(int folder, char *names, char *room, int64_t capacity, char **order, int64_t *sizes, int64_t most) {
    int again = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* `closedir` closes it */
    DIR *entries = again < 0 ? NULL : fdopendir(again);
    int64_t count = 0, at = 0, status = 0;
    if (!entries) {
        if (again >= 0) close(again);
        return -2;
    }
    errno = 0;
    for (struct dirent *entry; status == 0 && (entry = readdir(entries)); errno = 0) {
        struct stat found;
        int64_t length = (int64_t)strlen(entry->d_name), size = -1;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (count == most || at + length + 1 + (int64_t)sizeof size > capacity) {
            status = -1;
            continue;
        }
        if ((entry->d_type == DT_REG || entry->d_type == DT_UNKNOWN) && fstatat(folder, entry->d_name, &found, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(found.st_mode))
            size = found.st_size;
        order[count++] = memcpy(room + at, entry->d_name, (size_t)length + 1);
        memcpy(room + at + length + 1, &size, sizeof size);
        at += length + 1 + (int64_t)sizeof size;
    }
    if (status == 0 && errno) status = -2;
    closedir(entries);
    if (status) return status;
    qsort(order, (size_t)count, sizeof *order, by_name);
    at = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t length = (int64_t)strlen(order[i]);
        memcpy(names + at, order[i], (size_t)length + 1);
        memcpy(&sizes[i], order[i] + length + 1, sizeof sizes[i]);
        at += length + 1;
    }
    return at;
}

/* ---- images: structure and checksums, as aecore/data/image.py checks them ----------------------------------------------------------- */

typedef struct {
    uint8_t kind, detail[3]; /* 0: look at it in Python, which says what is wrong or knows more formats; 1 PNG, 2 JPEG */
    uint32_t width, height;
} Facts;

static uint32_t crc_table[8][256]; /* of zlib's CRC-32, eight bytes at a time */

__attribute__((constructor)) static void make_crc_table(void) {
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320 : crc >> 1;
        crc_table[0][n] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int n = 0; n < 256; n++) crc_table[k][n] = crc_table[k - 1][n] >> 8 ^ crc_table[0][crc_table[k - 1][n] & 255];
}

static uint32_t crc32(const uint8_t *data, int64_t size) {
    uint32_t crc = 0xFFFFFFFF;
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++) crc ^= crc_table[7 - k][word >> 8 * k & 255];
    }
    for (; size; size--, data++) crc = crc >> 8 ^ crc_table[0][(crc ^ *data) & 255];
    return ~crc;
}

static uint32_t number(const uint8_t *data, int bytes) {
    uint32_t value = 0;
    for (; bytes; bytes--) value = value << 8 | *data++;
    return value;
}

/* A PNG whose chunks fit their checksums up to IEND, with an IDAT among them. */
static Facts examine_png(const uint8_t *data, int64_t size) {
    static const uint8_t start[16] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n', 0, 0, 0, 13, 'I', 'H', 'D', 'R'};
    Facts none = {0}, found = {.kind = 1};
    int has_pixels = 0;
    if (size < 33 || memcmp(data, start, sizeof start) != 0) return none;
    for (int64_t at = 8; at + 12 <= size;) {
        int64_t length = number(data + at, 4);
        const uint8_t *name = data + at + 4;
        if (length > size - at - 12 || crc32(name, length + 4) != number(name + 4 + length, 4)) return none;
        if (memcmp(name, "IDAT", 4) == 0) has_pixels = 1;
        if (memcmp(name, "IEND", 4) == 0) {
            found.width = number(data + 16, 4);
            found.height = number(data + 20, 4);
            found.detail[0] = data[24]; /* bits, kind of colour */
            found.detail[1] = data[25];
            return has_pixels ? found : none;
        }
        at += length + 12;
    }
    return none;
}

/* A JPEG whose segments lead to one frame header and then to a scan, and which ends with an end marker. */
static Facts examine_jpeg(const uint8_t *data, int64_t size) {
    Facts none = {0}, found = {0};
    if (data[size - 2] != 0xFF || data[size - 1] != 0xD9) return none;
    for (int64_t at = 2; at + 4 <= size;) {
        int marker = data[at + 1];
        int64_t length = number(data + at + 2, 2);
        if (data[at] != 0xFF || marker < 0xC0 || marker == 0xD8 || marker == 0xD9 || marker == 0xFF || length < 2) return none;
        if (marker == 0xDA) return found;
        if (marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            if (found.kind || at + 10 > size) return none;
            found = (Facts){2, {(uint8_t)marker, data[at + 4], data[at + 9]}, number(data + at + 7, 2), number(data + at + 5, 2)};
        }
        at += 2 + length;
    }
    return none;
}

/* Say what a file is; files of equal facts have equal headers. */
static Facts examine(const uint8_t *file, int64_t size) {
    Facts none = {0};
    if (size < 8) return none;
    if (file[0] == 0x89) return examine_png(file, size);
    return file[0] == 0xFF && file[1] == 0xD8 ? examine_jpeg(file, size) : none;
}

/* What each of `n` files at [begins[i], ends[i]) of `data` is. */
void aecore_examine(const uint8_t *data, const int64_t *begins, const int64_t *ends, int64_t n, Facts *facts) {
    for (int64_t i = 0; i < n; i++) facts[i] = examine(data + begins[i], ends[i] - begins[i]);
}

/* ---- small PNGs to pixels ------------------------------------------------------------------------------------------------------------ */

enum { MOST_ROWS = 1 << 16 }; /* bytes of an image's filtered rows */
typedef int (*Uncompress)(uint8_t *, unsigned long *, const uint8_t *, unsigned long); /* zlib's function of that name */

/* Undo the filters of rows of `stride` bytes, `step` bytes a pixel (PNG, third edition, section 9). Return 0 if there is no such filter. */
static int unfilter(const uint8_t *rows, uint8_t *pixels, int64_t height, int64_t stride, int64_t step) {
    static const uint8_t none[MOST_ROWS];
    const uint8_t *up = none;
    for (; height; height--, rows += stride, up = pixels, pixels += stride) {
        int filter = *rows++;
        if (filter > 4) return 0;
        for (int64_t x = 0; x < stride; x++) {
            int left = x < step ? 0 : pixels[x - step], corner = x < step ? 0 : up[x - step], guess = 0;
            if (filter == 1) guess = left;
            if (filter == 2) guess = up[x];
            if (filter == 3) guess = (left + up[x]) / 2;
            if (filter == 4) {
                int by_left = up[x] - corner, by_up = left - corner, by_corner = by_left + by_up; /* how far the sum is from each */
                by_left = by_left < 0 ? -by_left : by_left, by_up = by_up < 0 ? -by_up : by_up;
                by_corner = by_corner < 0 ? -by_corner : by_corner;
                guess = by_left <= by_up && by_left <= by_corner ? left : by_up <= by_corner ? up[x] : corner;
            }
            pixels[x] = (uint8_t)(rows[x] + guess);
        }
    }
    return 1;
}

static int decode_png(Uncompress uncompress, const uint8_t *data, int64_t size, uint8_t *pixels, int64_t height, int64_t width, int64_t step) {
    static const uint8_t colours[5] = {0, 0, 4, 2, 6}; /* by channels */
    uint8_t rows[MOST_ROWS];
    const uint8_t *packed = NULL;
    unsigned long expected = (unsigned long)(height * (width * step + 1)), found = expected;
    Facts facts = examine_png(data, size);
    if (!facts.kind || facts.width != width || facts.height != height || data[24] != 8 || data[25] != colours[step]) return 0;
    if (data[26] || data[27] || data[28]) return 0; /* no such compression or filters; interlaced */
    for (int64_t at = 8; memcmp(data + at + 4, "IEND", 4) != 0; at += number(data + at, 4) + 12) {
        if (memcmp(data + at + 4, "IDAT", 4) != 0) continue;
        if (packed) return 0; /* pixels in pieces */
        packed = data + at;
    }
    if (uncompress(rows, &found, packed + 8, number(packed, 4)) != 0 || found != expected) return 0;
    return unfilter(rows, pixels, height, width * step, step);
}

/* Decode `n` PNGs at [begins[i], ends[i]) of `data` into `pixels` `[n, height, width, channels]`, whose filtered rows fit MOST_ROWS bytes.
 * `done[i]` is 0 where one was left out: it is not of that size, of 8 bits and so many channels, or there is anything unusual about it. */
void aecore_decode_pngs(Uncompress uncompress, const uint8_t *data, const int64_t *begins, const int64_t *ends, int64_t n, uint8_t *pixels,
                        int64_t height, int64_t width, int64_t channels, uint8_t *done) {
    for (int64_t i = 0; i < n; i++, pixels += height * width * channels)
        done[i] = (uint8_t)decode_png(uncompress, data + begins[i], ends[i] - begins[i], pixels, height, width, channels);
}

/* ---- tar --------------------------------------------------------------------------------------------------------------------------- */

static void write_octal(uint8_t *field, int64_t value, int digits) {
    for (; digits--; value >>= 3) field[digits] = (uint8_t)('0' + (value & 7));
}

static int64_t stored_size(int64_t size) { return BLOCK + size + (-size & (BLOCK - 1)); }

/* Write what stands around the `size` bytes of a member: before them a copy of the header `blank` with name, size and checksum, behind them
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

/* Write all but the data of a sample whose first header stands at `buffer`: its members stand by extension, and where the label is not
 * negative one of them is `cls`. Return where the data stand. `name` has a dot and at most 96 bytes. */
static uint8_t *frame_sample(uint8_t *buffer, const uint8_t *blank, const char *name, int32_t label, int64_t size) {
    uint8_t *member = label >= 0 && strcmp(strrchr(name, '.') + 1, "cls") > 0 ? buffer + 2 * BLOCK : buffer;
    frame_member(member, blank, name, strlen(name), size);
    if (label >= 0) write_label(member == buffer ? buffer + stored_size(size) : buffer, blank, name, label);
    return member + BLOCK;
}

/* Write `n` samples one after the other: the data at [begins[i], ends[i]) under its name, which is ended by a zero byte, and its label.
 * `blank` has spaces in its checksum's place. */
void aecore_pack(uint8_t *buffer, const uint8_t *blank, const char *names, const uint8_t *data, const int64_t *begins, const int64_t *ends,
                 const int32_t *labels, int64_t n) {
    for (int64_t i = 0; i < n; i++, names += strlen(names) + 1) {
        int64_t size = ends[i] - begins[i];
        memcpy(frame_sample(buffer, blank, names, labels[i], size), data + begins[i], (size_t)size);
        buffer += stored_size(size) + (labels[i] >= 0 ? 2 * BLOCK : 0);
    }
}

/* ---- from files to a tar ---------------------------------------------------------------------------------------------------------------
 *
 * The samples are cut into blocks. Two threads read blocks, each file to its place in the tar, and write the headers around it; one thread
 * where files are large: hashing those takes longer than reading. The caller takes the blocks in their order (`aecore_run_read`), looks at
 * their facts and lets them be hashed (`aecore_run_accept`), which a third thread does; then the caller has the pages of the tar that they
 * fill (`aecore_run_hashed`) to write, and gives their memory back.
 */

enum { READERS = 2, LARGE = 4096, PAGE = 4096, UNREAD = 0, PLAIN = 1, OTHER = 2 };

typedef struct {
    int64_t folder, num_blocks, num_slots, slot_bytes;
    const char *paths, *names;                  /* each ended by a zero byte */
    const int64_t *path_at, *name_at;           /* where each begins */
    const int32_t *labels;                      /* negative: none */
    const int64_t *starts, *begins, *ends;      /* of each sample in the tar: its first header, its data */
    const int64_t *cuts;                        /* [num_blocks + 1]: the first sample of each block */
    const uint8_t *blank;                       /* header */
    uint8_t *slots;                             /* memory for `num_slots` blocks, each from a page on */
    uint32_t *state;                            /* of the tar's hash */
    uint8_t *digests, *tail;                    /* of the samples; what the tar has after its last full page */
    Facts *facts;                               /* of the samples */
} Given;

typedef struct {
    Given given;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t threads[READERS + 1];
    int64_t taken, shown, accepted, hashed, given_back; /* blocks */
    int num_threads, stopped;
    uint8_t *kinds; /* of blocks */
} Run;

static int64_t page_of(int64_t place) { return place & ~(int64_t)(PAGE - 1); }

/* Return the memory of a block, and the place in the tar of its first byte. */
static uint8_t *slot_of(const Run *run, int64_t block, int64_t *origin) {
    *origin = page_of(run->given.starts[run->given.cuts[block]]);
    return run->given.slots + block % run->given.num_slots * run->given.slot_bytes;
}

/* Write all but the data of a sample that was read; 0 if it has another size than expected, or is no image that is known. */
static int finish_sample(const Given *given, int64_t i, uint8_t *slot, int64_t origin, int64_t size) {
    if (size != given->ends[i] - given->begins[i]) return 0;
    given->facts[i] = examine(slot + (given->begins[i] - origin), size);
    frame_sample(slot + (given->starts[i] - origin), given->blank, given->names + given->name_at[i], given->labels[i], size);
    return given->facts[i].kind != 0;
}

/* Read one block. Return 0 as soon as there is anything unusual.
 *
 * Up to 32 files that have to come from the disk are asked for before the first is waited for. */
static int read_block(const Run *run, int64_t block) {
    const Given *given = &run->given;
    int64_t origin, number[MOST_WAITING], i = given->cuts[block], stop = given->cuts[block + 1];
    uint8_t *slot = slot_of(run, block, &origin);
    int waiting[MOST_WAITING], num = 0, plain = 1;
    while (i < stop || num) {
        int64_t expected = given->ends[i < stop ? i : stop - 1] - given->begins[i < stop ? i : stop - 1], size = -1;
        int file = -1, full = num == MOST_WAITING || i == stop || !plain;
        if (!full) {
            file = openat((int)given->folder, given->paths + given->path_at[i], O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a FIFO does not hold us up */
            full = file < 0 && num && (errno == EMFILE || errno == ENFILE);
        }
        if (full) {
            for (int k = 0; k < num; k++) {
                int64_t late = number[k], length = given->ends[late] - given->begins[late];
                size = plain ? read_whole(waiting[k], slot + (given->begins[late] - origin), length + BLOCK, length, 1) : -1;
                close(waiting[k]);
                plain = plain && finish_sample(given, late, slot, origin, size);
            }
            num = 0;
            if (!plain) return 0;
            continue;
        }
        if (file >= 0) size = read_whole(file, slot + (given->begins[i] - origin), expected + BLOCK, expected, 0);
        if (size == -3) {
            posix_fadvise(file, 0, 0, POSIX_FADV_WILLNEED);
            waiting[num] = file;
            number[num++] = i;
        } else {
            if (file >= 0) close(file);
            plain = finish_sample(given, i, slot, origin, size);
            if (!plain && !num) return 0;
        }
        i++;
    }
    return 1;
}

static void *reader(void *argument) {
    Run *run = argument;
    pthread_mutex_lock(&run->lock);
    for (;;) {
        while (!run->stopped && run->taken < run->given.num_blocks && run->taken >= run->given_back + run->given.num_slots)
            pthread_cond_wait(&run->changed, &run->lock);
        if (run->stopped || run->taken == run->given.num_blocks) break;
        int64_t block = run->taken++;
        pthread_mutex_unlock(&run->lock);
        int plain = read_block(run, block);
        pthread_mutex_lock(&run->lock);
        run->kinds[block] = plain ? PLAIN : OTHER;
        pthread_cond_broadcast(&run->changed);
    }
    pthread_mutex_unlock(&run->lock);
    return NULL;
}

/* Pages are hashed and written whole: the first one of a block begins with the end of the block before it. */
static void hash_block(Run *run, int64_t block) {
    const Given *given = &run->given;
    int64_t origin, first = given->cuts[block], stop = given->cuts[block + 1], end = given->starts[stop];
    uint8_t *slot = slot_of(run, block, &origin);
    memcpy(slot, given->tail, (size_t)(given->starts[first] - origin));
    hash_beside(given->state, slot, (page_of(end) - origin) / 64, slot, origin, given->begins + first, given->ends + first, stop - first,
                given->digests + 32 * first);
    memcpy(given->tail, slot + (page_of(end) - origin), (size_t)(end - page_of(end)));
}

static void *hasher(void *argument) {
    Run *run = argument;
    pthread_mutex_lock(&run->lock);
    for (;;) {
        while (!run->stopped && run->hashed == run->accepted) pthread_cond_wait(&run->changed, &run->lock);
        if (run->hashed == run->accepted) break; /* what was accepted is hashed also when no more is to come */
        pthread_mutex_unlock(&run->lock);
        hash_block(run, run->hashed);
        pthread_mutex_lock(&run->lock);
        run->hashed++;
        pthread_cond_broadcast(&run->changed);
    }
    pthread_mutex_unlock(&run->lock);
    return NULL;
}

/* End the threads; nothing of the run is used afterwards. */
void aecore_run_stop(Run *run) {
    pthread_mutex_lock(&run->lock);
    run->stopped = 1;
    pthread_cond_broadcast(&run->changed);
    pthread_mutex_unlock(&run->lock);
    for (int k = 0; k < run->num_threads; k++) pthread_join(run->threads[k], NULL);
    pthread_cond_destroy(&run->changed);
    pthread_mutex_destroy(&run->lock);
    free(run->kinds);
    free(run);
}

/* Begin; NULL if there is no memory or no thread. What is given stays where it is until `aecore_run_stop`. */
Run *aecore_run_start(const Given *given) {
    Run *run = calloc(1, sizeof *run);
    if (!run) return NULL;
    run->given = *given;
    run->kinds = calloc((size_t)given->num_blocks, 1);
    pthread_mutex_init(&run->lock, NULL);
    pthread_cond_init(&run->changed, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that know Python */
    int64_t count = given->cuts[given->num_blocks], num_readers = given->starts[count] - given->starts[0] > LARGE * count ? 1 : READERS;
    for (int k = 0; run->kinds && k <= num_readers; k++) {
        if (pthread_create(&run->threads[k], NULL, k < num_readers ? reader : hasher, run) != 0) break;
        run->num_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (run->num_threads == num_readers + 1) return run;
    aecore_run_stop(run);
    return NULL;
}

/* Wait for the next block to be read. Return 1 if all in it is plain, 0 if not or if there is no block any more. */
int64_t aecore_run_read(Run *run) {
    pthread_mutex_lock(&run->lock);
    while (run->shown < run->given.num_blocks && run->kinds[run->shown] == UNREAD) pthread_cond_wait(&run->changed, &run->lock);
    int64_t plain = run->shown < run->given.num_blocks && run->kinds[run->shown] == PLAIN;
    run->shown += plain;
    pthread_mutex_unlock(&run->lock);
    return plain;
}

/* Let the block that was read last be hashed. */
void aecore_run_accept(Run *run) {
    pthread_mutex_lock(&run->lock);
    run->accepted++;
    pthread_cond_broadcast(&run->changed);
    pthread_mutex_unlock(&run->lock);
}

/* Wait until the oldest accepted block that was not given back is hashed; return the bytes of the full pages that end in it. */
int64_t aecore_run_hashed(Run *run) {
    int64_t origin;
    pthread_mutex_lock(&run->lock);
    while (run->hashed == run->given_back) pthread_cond_wait(&run->changed, &run->lock);
    pthread_mutex_unlock(&run->lock);
    slot_of(run, run->given_back, &origin);
    return page_of(run->given.starts[run->given.cuts[run->given_back + 1]]) - origin;
}

/* Give its memory back. */
void aecore_run_give_back(Run *run) {
    pthread_mutex_lock(&run->lock);
    run->given_back++;
    pthread_cond_broadcast(&run->changed);
    pthread_mutex_unlock(&run->lock);
}

/* Return the version of this interface, 0 if this processor cannot run it. */
int64_t aecore_native(void) {
    unsigned a, b, c, d;
    int has_sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
    const char *wanted = getenv("AECORE_AVX512");
    has_wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && !(wanted && strcmp(wanted, "0") == 0);
    int has_sse = __get_cpuid(1, &a, &b, &c, &d) && (c >> 19 & 1) && (c >> 9 & 1);
    return has_sha && has_sse ? VERSION : 0;
}

#else
int64_t aecore_native(void) { return 0; }
#endif
