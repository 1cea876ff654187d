/* The innermost loops of shards, in plain C without Python's headers: called through ctypes, so the interpreter is free meanwhile.
 *
 * Every function has a twin in Python that gives the same; tests compare the two. Nothing here allocates: callers pass buffers that are large
 * enough. x86-64 with SHA extensions (Intel since 2019, AMD since 2017) only.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>

enum { VERSION = 3, BLOCK = 512, NAME = 100, SIZE_AT = 124, SUM_AT = 148, MOST_WAITING = 32 };

/* ---- sha256 (FIPS 180-4) with the processor's own instructions, two messages at a time --------------------------------------------
 *
 * A round waits for the round before, so one message leaves half of the unit idle; a second one fills it (1.5 times the bytes per second).
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

SHA static void compress(uint32_t state[8], const uint8_t *data, int64_t blocks) {
    Rounds lane;
    load_state(&lane, state);
    for (; blocks; blocks--, data += 64) {
        __m128i abef = lane.abef, cdgh = lane.cdgh;
        load_words(&lane, data);
#pragma GCC unroll 16
        for (int step = 0; step < 16; step++) four_rounds(&lane, step);
        add_state(&lane, abef, cdgh);
    }
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
    memcpy(job->end, data + size - rest, rest);
    job->end[rest] = 0x80;
    for (int i = 0; i < 8; i++) job->end[64 * job->end_blocks - 1 - i] = (uint8_t)((uint64_t)size * 8 >> 8 * i);
}

static void finish_message(Job *job) {
    for (int i = 0; job->digest && i < 32; i++) job->digest[i] = (uint8_t)(job->state[i / 4] >> (24 - 8 * (i % 4)));
}

/* Hash `n` messages, at [begins[i], ends[i]) of `data`, into 32 bytes each of `digests`, and beside them `blocks` blocks of 64 bytes of a
 * stream into its `state`. */
void aecore_sha256(uint32_t *state, const uint8_t *stream, int64_t blocks, const uint8_t *data, const int64_t *begins, const int64_t *ends,
                   int64_t n, uint8_t *digests) {
    Job jobs[2];
    int busy[2] = {0, 0};
    int64_t next = 0;
    if (blocks) {
        jobs[0] = (Job){.state = state, .data = stream, .blocks = blocks};
        busy[0] = 1;
    }
    for (;;) {
        for (int k = 0; k < 2; k++) {
            if (busy[k] && jobs[k].blocks == 0 && jobs[k].end_blocks) {
                jobs[k].data = jobs[k].end;
                jobs[k].blocks = jobs[k].end_blocks;
                jobs[k].end_blocks = 0;
            } else if (busy[k] && jobs[k].blocks == 0) {
                finish_message(&jobs[k]);
                busy[k] = 0;
            }
            if (!busy[k] && next < n) {
                begin_message(&jobs[k], data + begins[next], ends[next] - begins[next], digests + 32 * next);
                next++;
                busy[k] = 1;
            }
        }
        if (!busy[0] && !busy[1]) return;
        Job *one = &jobs[busy[0] ? 0 : 1], *other = &jobs[1];
        int64_t count = one->blocks;
        if (busy[0] && busy[1]) {
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

/* Read `n` files, each path in `folder` ended by a zero byte, into `buffer`. File i stands at [begins[i], ends[i]), it was not read if it ends
 * before it begins; `sizes` are what they had when they were listed.
 *
 * Return how many were tried: fewer than `n` when the buffer is full (a first file that does not fit counts as tried), when 32 wait for the
 * disk (it works at all of them at once: what is not in memory is asked for first and waited for last), or when those are all the descriptors
 * that this process may have. */
int64_t aecore_read(int folder, const char *paths, const int64_t *sizes, int64_t n, uint8_t *buffer, int64_t capacity, int64_t *begins,
                    int64_t *ends) {
    int waiting[MOST_WAITING];
    int64_t number[MOST_WAITING], num_waiting = 0, at = 0, tried = 0;
    for (; tried < n && num_waiting < MOST_WAITING; tried++, paths += strlen(paths) + 1) {
        int64_t size = -1;
        int file = openat(folder, paths, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a FIFO does not hold us up */
        if (file < 0 && num_waiting && (errno == EMFILE || errno == ENFILE)) break;
        if (file >= 0) size = read_whole(file, buffer + at, capacity - at, sizes[tried], 0);
        begins[tried] = at;
        ends[tried] = at + (size < 0 ? -1 : size);
        if (size == -3) {
            posix_fadvise(file, 0, 0, POSIX_FADV_WILLNEED);
            waiting[num_waiting] = file;
            number[num_waiting++] = tried;
            continue;
        }
        if (file >= 0) close(file);
        if (size == -2 && tried) break;
        if (size > 0) at += size;
    }
    for (int64_t i = 0; i < num_waiting; i++) {
        int64_t size = read_whole(waiting[i], buffer + at, capacity - at, sizes[number[i]], 1);
        close(waiting[i]);
        begins[number[i]] = at;
        ends[number[i]] = at + (size < 0 ? -1 : size);
        if (size > 0) at += size;
    }
    return tried;
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

/* List an open folder: names into `names`, each ended by a zero byte, and into `sizes` the bytes of regular files, -1 for everything else.
 *
 * Return the bytes of all names, or -1 if they do not fit (`capacity` bytes of names, `most` of them), or -2 if the folder cannot be read. */
int64_t aecore_list(int folder, char *names, int64_t capacity, int64_t *sizes, int64_t most) {
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
        int64_t size = (int64_t)strlen(entry->d_name) + 1;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (count == most || at + size > capacity) {
            status = -1;
            continue;
        }
        memcpy(names + at, entry->d_name, (size_t)size);
        at += size;
        int is_file = (entry->d_type == DT_REG || entry->d_type == DT_UNKNOWN) &&
                      fstatat(folder, entry->d_name, &found, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(found.st_mode);
        sizes[count++] = is_file ? (int64_t)found.st_size : -1;
    }
    if (status == 0 && errno) status = -2;
    closedir(entries);
    return status ? status : at;
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

/* Say what each of `n` files at [begins[i], ends[i]) of `data` is; files of equal facts have equal headers. */
void aecore_examine(const uint8_t *data, const int64_t *begins, const int64_t *ends, int64_t n, Facts *facts) {
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *file = data + begins[i];
        int64_t size = ends[i] - begins[i];
        facts[i] = (Facts){0};
        if (size < 8) continue;
        if (file[0] == 0x89) facts[i] = examine_png(file, size);
        if (file[0] == 0xFF && file[1] == 0xD8) facts[i] = examine_jpeg(file, size);
    }
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

/* Write one member: a copy of the header `blank` with name, size and checksum; the bytes; zeros up to a full block. Return what follows it. */
static uint8_t *write_member(uint8_t *buffer, const uint8_t *blank, const char *name, size_t name_size, const void *data, int64_t size) {
    uint32_t sum = 0;
    memcpy(buffer, blank, BLOCK);
    memcpy(buffer, name, name_size);
    write_octal(buffer + SIZE_AT, size, 11);
    for (int at = 0; at < BLOCK; at++) sum += buffer[at];
    write_octal(buffer + SUM_AT, sum, 6);
    buffer[SUM_AT + 6] = 0;
    memcpy(buffer + BLOCK, data, (size_t)size);
    memset(buffer + BLOCK + size, 0, (size_t)(-size & (BLOCK - 1)));
    return buffer + BLOCK + size + (-size & (BLOCK - 1));
}

/* Write `n` samples one after the other: the data at [begins[i], ends[i]) under its name, and where labels[i] is not negative a member with
 * the extension `cls` that holds its digits; members of a sample stand by extension.
 *
 * Each of `names` is ended by a zero byte, has a dot and at most 96 bytes. `blank` has spaces in its checksum's place. */
void aecore_pack(uint8_t *buffer, const uint8_t *blank, const char *names, const uint8_t *data, const int64_t *begins, const int64_t *ends,
                 const int32_t *labels, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        size_t name_size = strlen(names), digits_size = 0;
        const char *ext = strrchr(names, '.') + 1;
        int is_first = strcmp(ext, "cls") < 0;
        char cls[NAME], digits[12];
        if (is_first) buffer = write_member(buffer, blank, names, name_size, data + begins[i], ends[i] - begins[i]);
        if (labels[i] >= 0) {
            memcpy(cls, names, (size_t)(ext - names));
            memcpy(cls + (ext - names), "cls", 3);
            for (int32_t rest = labels[i]; rest || !digits_size; rest /= 10) digits[11 - digits_size++] = (char)('0' + rest % 10);
            buffer = write_member(buffer, blank, cls, (size_t)(ext - names) + 3, digits + 12 - digits_size, (int64_t)digits_size);
        }
        if (!is_first) buffer = write_member(buffer, blank, names, name_size, data + begins[i], ends[i] - begins[i]);
        names += name_size + 1;
    }
}

/* Return the version of this interface, 0 if this processor cannot run it. */
int64_t aecore_native(void) {
    unsigned a, b, c, d;
    int has_sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
    int has_sse = __get_cpuid(1, &a, &b, &c, &d) && (c >> 19 & 1) && (c >> 9 & 1);
    return has_sha && has_sse ? VERSION : 0;
}

#else
int64_t aecore_native(void) { return 0; }
#endif
