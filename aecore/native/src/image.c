/* Images: their structure and checksums, as aecore/data/format/image.py checks them, and the pixels of small PNGs. */

#define _GNU_SOURCE
#include "native.h"

#ifdef HERE
#include <string.h>

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

/* Return the orientation, 1 to 8, that an EXIF block says (a TIFF header and its first directory); 1 where it says none. */
static int exif_orientation(const uint8_t *block, int64_t size) {
    for (; size >= 6 && memcmp(block, "Exif\0\0", 6) == 0; block += 6, size -= 6) {} /* some write it twice */
    if (size < 8 || (memcmp(block, "II*\0", 4) != 0 && memcmp(block, "MM\0*", 4) != 0)) return 1;
    int little = block[0] == 'I';
#define TWO(at) (little ? block[at] | block[(at) + 1] << 8 : block[at] << 8 | block[(at) + 1])
    int64_t at = little ? TWO(4) | (int64_t)TWO(6) << 16 : (int64_t)TWO(4) << 16 | TWO(6);
    if (at + 2 > size) return 1;
    int64_t stop = at + 2 + 12 * (int64_t)TWO(at);
    for (at += 2; at < stop && at + 4 <= size; at += 12) {
        if (TWO(at) != 0x0112) continue;
        int64_t value = 0;
        switch (TWO(at + 2)) {
            case 1: case 6: value = at + 9 <= size ? block[at + 8] : 0; break;
            case 3: case 8: value = at + 10 <= size ? TWO(at + 8) : 0; break;
            case 4: case 9: value = at + 12 > size ? 0 : little ? TWO(at + 8) | (int64_t)TWO(at + 10) << 16 : (int64_t)TWO(at + 8) << 16 | TWO(at + 10);
        }
        return value >= 1 && value <= 8 ? (int)value : 1;
    }
#undef TWO
    return 1;
}

/* Return whether an XMP packet says an orientation that is not 1: which one counts is left to `data.format`. */
static int turns(const uint8_t *xmp, int64_t size) {
    static const char name[] = "tiff:Orientation";
    for (int64_t at = 0; at + 18 <= size; at++) {
        const uint8_t *value = xmp + at + 16;
        if (xmp[at] != 't' || memcmp(xmp + at, name, 16) != 0) continue;
        if (value[0] == '=' && value[1] == '"') value++;
        else if (value[0] != '>') continue;
        value++;
        if (value < xmp + size && *value >= '0' && *value <= '9') return *value != '1';
    }
    return 0;
}

/* Return whether a text chunk of a PNG may turn its pixels: EXIF as text, or XMP that is packed or says so. */
static int turns_png(const uint8_t *name, const uint8_t *text, int64_t length) {
    static const char raw[] = "Raw profile type exif", xmp[] = "XML:com.adobe.xmp"; /* with the zero after them */
    if (memcmp(name, "iTXt", 4) != 0 && memcmp(name, "tEXt", 4) != 0 && memcmp(name, "zTXt", 4) != 0) return 0;
    if (length >= (int64_t)sizeof raw && memcmp(text, raw, sizeof raw) == 0) return 1;
    if (length < (int64_t)sizeof xmp || memcmp(text, xmp, sizeof xmp) != 0) return 0;
    return length == (int64_t)sizeof xmp || text[sizeof xmp] || turns(text, length);
}

/* A PNG whose chunks match their checksums up to IEND, with an IDAT among them. `kind` is 3 if it is animated, has EXIF or a transparency
 * that is none. */
static Facts examine_chunks(const uint8_t *data, int64_t size) {
    static const uint8_t start[16] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n', 0, 0, 0, 13, 'I', 'H', 'D', 'R'};
    Facts none = {0}, found = {.kind = 1};
    int has_pixels = 0;
    int64_t colours = 0;
    if (size < 33 || memcmp(data, start, sizeof start) != 0) return none;
    for (int64_t at = 8; at + 12 <= size;) {
        int64_t length = number(data + at, 4);
        const uint8_t *name = data + at + 4;
        if (length > size - at - 12 || crc32(name, length + 4) != number(name + 4 + length, 4)) return none;
        if (memcmp(name, "IDAT", 4) == 0) has_pixels = 1;
        if (memcmp(name, "PLTE", 4) == 0 && !colours && !has_pixels && length % 3 == 0) colours = length / 3;
        if (memcmp(name, "tRNS", 4) == 0) { /* transparency, where it is in its place and fits the colours */
            int fits = data[25] == 0 ? length == 2 : data[25] == 2 ? length == 6 : data[25] == 3 && length && length <= colours;
            found.detail[2] = 1;
            if (!fits || has_pixels) found.kind = 3;
        }
        if (memcmp(name, "eXIf", 4) == 0 || memcmp(name, "acTL", 4) == 0 || turns_png(name, name + 4, length)) found.kind = 3;
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

static Facts examine_png(const uint8_t *data, int64_t size) {
    Facts none = {0}, found = examine_chunks(data, size);
    return found.kind == 1 ? found : none;
}

/* A JPEG whose segments lead to one frame header and then to a scan with an end marker behind it (some files go on after that). Not one
 * that says it holds several pictures. */
static Facts examine_jpeg(const uint8_t *data, int64_t size) {
    Facts none = {0}, found = {0};
    int orientation = 0;
    for (int64_t at = 2; at + 4 <= size;) {
        int marker = data[at + 1];
        int64_t length = number(data + at + 2, 2);
        if (data[at] == 0xFF && marker == 0xFF) { /* a fill byte */
            at++;
            continue;
        }
        if (data[at] != 0xFF || marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9) || length < 2) return none;
        if (marker == 0xDA) {
            if (!found.kind || length < 3 || at + 2 + length > size) return none;
            if (found.detail[0] != 0xC2 && data[at + 4] != found.detail[2]) return none; /* a scan of each component: there may be many */
            found.detail[2] |= (uint8_t)(orientation << 4);
            for (int64_t end = size - 2; end >= at; end--)
                if (data[end] == 0xFF && data[end + 1] == 0xD9) return found;
            return none;
        }
        if (marker == 0xE1 && !orientation && length >= 8 && at + 10 <= size && memcmp(data + at + 4, "Exif\0\0", 6) == 0)
            orientation = exif_orientation(data + at + 10, (length - 8 < size - at - 10 ? length - 8 : size - at - 10));
        if (marker == 0xE1 && length >= 31 && at + 2 + length <= size && memcmp(data + at + 4, "http://ns.adobe.com/xap/1.0/", 29) == 0
            && turns(data + at + 4, length - 2))
            return none;
        if (marker == 0xE2 && length >= 6 && at + 8 <= size && memcmp(data + at + 4, "MPF", 4) == 0) return none;
        if (marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            if (found.kind || at + 10 > size || data[at + 9] > 15) return none;
            found = (Facts){2, {(uint8_t)marker, data[at + 4], data[at + 9]}, number(data + at + 7, 2), number(data + at + 5, 2)};
        }
        at += 2 + length;
    }
    return none;
}

Facts examine(const uint8_t *file, int64_t size) {
    Facts none = {0};
    if (size < 8) return none;
    if (file[0] == 0x89) return examine_png(file, size);
    return file[0] == 0xFF && file[1] == 0xD8 ? examine_jpeg(file, size) : none;
}

/* Set the facts of each of `n` files at [begins[i], ends[i]) of `data`. */
void aecore_examine(const uint8_t *data, const int64_t *begins, const int64_t *ends, int64_t n, Facts *facts) {
    for (int64_t i = 0; i < n; i++) facts[i] = examine(data + begins[i], ends[i] - begins[i]);
}

/* ---- small PNGs to pixels ---- */


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

/* Return whether a chunk leaves the stored pixels unchanged; unknown chunks are left to libpng. Two count only `as_stored`: transparency
 * and EXIF. */
static int is_harmless(const uint8_t *name, int as_stored) {
    static const char known[][5] = {"eXIf", "tRNS", "tEXt", "zTXt", "iTXt", "tIME", "pHYs", "gAMA", "cHRM", "sRGB", "iCCP", "sBIT", "bKGD"};
    for (unsigned k = as_stored ? 0 : 2; k < sizeof known / sizeof *known; k++)
        if (memcmp(name, known[k], 4) == 0) return 1;
    return 0;
}

static int decode_png(Uncompress uncompress, const uint8_t *data, int64_t size, uint8_t *pixels, int64_t height, int64_t width, int64_t step,
                      int as_stored) {
    static const uint8_t colours[5] = {0, 0, 4, 2, 6}; /* by channels */
    uint8_t rows[MOST_ROWS];
    const uint8_t *packed = NULL;
    unsigned long expected = (unsigned long)(height * (width * step + 1)), found = expected;
    Facts facts = examine_chunks(data, size);
    if (!facts.kind || facts.width != width || facts.height != height || data[24] != 8 || data[25] != colours[step]) return 0;
    if (data[26] || data[27] || data[28]) return 0; /* no such compression or filters; interlaced */
    for (int64_t at = 8; memcmp(data + at + 4, "IEND", 4) != 0; at += number(data + at, 4) + 12) {
        if (memcmp(data + at + 4, "IDAT", 4) != 0) {
            if (at != 8 && !is_harmless(data + at + 4, as_stored)) return 0;
            if (!as_stored && turns_png(data + at + 4, data + at + 8, number(data + at, 4))) return 0;
            continue;
        }
        if (packed) return 0; /* pixels in pieces */
        packed = data + at;
    }
    if (number(packed, 4) < 2 || (256ul << (packed[8] >> 4)) < expected) return 0; /* libpng keeps to the window that the stream names */
    if (uncompress(rows, &found, packed + 8, number(packed, 4)) != 0 || found != expected) return 0;
    return unfilter(rows, pixels, height, width * step, step);
}

/* Decode `n` PNGs at [begins[i], ends[i]) of `data` into `pixels` `[n, height, width, channels]`, whose filtered rows fit MOST_ROWS bytes.
 * `done[i]` is 0 where one was left out: it is not of that size, of 8 bits and so many channels, or there is anything unusual about it. */
void aecore_decode_pngs(Uncompress uncompress, const uint8_t *data, const int64_t *begins, const int64_t *ends, int64_t n, uint8_t *pixels,
                        int64_t height, int64_t width, int64_t channels, int64_t as_stored, uint8_t *done) {
    for (int64_t i = 0; i < n; i++, pixels += height * width * channels)
        done[i] = (uint8_t)decode_png(uncompress, data + begins[i], ends[i] - begins[i], pixels, height, width, channels, (int)as_stored);
}

#endif
