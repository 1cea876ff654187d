/* sha256 (FIPS 180-4) with the processor's own instructions, two messages at a time.
 * 
 * A round waits for the round before, so one message leaves half of the unit idle; a second one fills it (1.5 times the bytes per second).
 * Where there is AVX-512, 16 messages go through the ordinary vector units instead, which one message in the other unit hardly disturbs.
 */

#define _GNU_SOURCE
#include "native.h"

#ifdef HERE
#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

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
    Rounds lane = {0};
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

static int has_wide; /* AVX-512, as asked last */

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

void hash_beside(uint32_t *state, const uint8_t *stream, int64_t blocks, const uint8_t *data, int64_t origin, const int64_t *begins,
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
