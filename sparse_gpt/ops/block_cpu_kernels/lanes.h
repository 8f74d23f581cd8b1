// Vectors of 32-bit lanes, and what the passes do with them.
//
// A lane holds a float, or a pair of bf16 numbers (the earlier one in the low half). Everything is
// written for vectors of kLanes; only what compilers do not find by themselves is by instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 has it of its own intrinsics
#endif
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kTile = 64;  // tokens of a tile

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float VecAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Vec load(const float* at) { return *reinterpret_cast<const VecAt*>(at); }
static inline void store(float* at, Vec v) { *reinterpret_cast<VecAt*>(at) = v; }

static inline Vec splat(float s) {
#if defined(__AVX512F__)
    return Vec{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
#elif defined(__AVX__)
    return Vec{s, s, s, s, s, s, s, s};
#else
    return Vec{s, s, s, s};
#endif
}

static inline Ints bits(Vec v) { return reinterpret_cast<Ints>(v); }
static inline Vec floats(Ints v) { return reinterpret_cast<Vec>(v); }
static inline Vec choose(Ints mask, Vec yes, Vec no) {
    return floats((mask & bits(yes)) | (~mask & bits(no)));
}

static inline float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

// bf16 by bits: rounded to nearest even; NaN stays NaN.
static inline float wide(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
static inline uint16_t narrow(float f) {
    const uint32_t u = to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// The same of 16 numbers.
static inline void wide_16(const uint16_t* from, float* to) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm512_storeu_si512(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
    for (int i = 0; i < 16; ++i) to[i] = wide(from[i]);
#endif
}
#if defined(__AVX512F__)
static inline void narrow_16(Vec from, uint16_t* to) {
    const __m512 v = (__m512)from;
    const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(up, 16),
                                                 _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), high,
                                                 _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
#endif
static inline void narrow_16(const float* from, uint16_t* to) {
#if defined(__AVX512F__)
    narrow_16(load(from), to);
#else
    for (int i = 0; i < 16; ++i) to[i] = narrow(from[i]);
#endif
}

// acc + a * b, a lane a float.
struct Floats {
    static constexpr int kPerUnit = 1;  // numbers a lane
    static Vec dot(Vec acc, Vec a, Vec b) { return acc + a * b; }
    static float ones() { return 1.0f; }
};

// acc + a.low * b.low + a.high * b.high, a lane a pair.
struct Pairs {
    static constexpr int kPerUnit = 2;
    static Vec dot(Vec acc, Vec a, Vec b) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
        const Ints high = Ints{} - 0x10000;
        acc = acc + floats(bits(a) & high) * floats(bits(b) & high);
        return acc + floats(bits(a) << 16) * floats(bits(b) << 16);
#endif
    }
    static float ones() { return from_bits(0x3f803f80); }
};

static inline float pair_of(uint16_t low, uint16_t high) {
    return from_bits(static_cast<uint32_t>(high) << 16 | low);
}

// Pairs of one number of a and one of b, of the first 16 and of the other 16.
static inline void zip(const uint16_t* a, const uint16_t* b, float* first, float* second) {
#if defined(__AVX512BW__)
    alignas(64) static constexpr uint16_t order[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(order);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i left = _mm512_loadu_si512(a), right = _mm512_loadu_si512(b);
    _mm512_storeu_si512(first, _mm512_permutex2var_epi16(left, low, right));
    _mm512_storeu_si512(second, _mm512_permutex2var_epi16(left, high, right));
#else
    for (int i = 0; i < 16; ++i) {
        first[i] = pair_of(a[i], b[i]);
        second[i] = pair_of(a[16 + i], b[16 + i]);
    }
#endif
}

// The same of 16 numbers.
static inline void zip_16(const uint16_t* a, const uint16_t* b, float* out) {
#if defined(__AVX512F__)
    const __m256i* left = reinterpret_cast<const __m256i*>(a);
    const __m256i* right = reinterpret_cast<const __m256i*>(b);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(right)), 16);
    _mm512_storeu_si512(
        out, _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(left)), high));
#else
    for (int i = 0; i < 16; ++i) out[i] = pair_of(a[i], b[i]);
#endif
}

// Of 4 x 4 numbers pairs of neighbours of a row, or of a column if `turned`: [2 units][4].
static inline void pairs_of_four(const uint16_t* block, bool turned, float* out) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block));
    const __m256i order =
        turned ? _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
               : _mm256_setr_epi16(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutexvar_epi16(order, rows));
#else
    for (int unit = 0; unit < 2; ++unit)
        for (int o = 0; o < 4; ++o)
            out[4 * unit + o] = turned ? pair_of(block[8 * unit + o], block[8 * unit + 4 + o])
                                       : pair_of(block[4 * o + 2 * unit], block[4 * o + 2 * unit + 1]);
#endif
}

// out[c * to + r] = in[r * from + c], 16 x 16.
static inline void transpose(const float* in, int64_t from, float* out, int64_t to) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * from);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; ++i) {  // r[4q + i]: rows 4q .. 4q + 3 of columns i, 4 + i, 8 + i, 12 + i
        const __m512 a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
        const __m512 b = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
        _mm512_storeu_ps(out + i * to, _mm512_shuffle_f32x4(a, c, 0x88));
        _mm512_storeu_ps(out + (8 + i) * to, _mm512_shuffle_f32x4(a, c, 0xdd));
        _mm512_storeu_ps(out + (4 + i) * to, _mm512_shuffle_f32x4(b, d, 0x88));
        _mm512_storeu_ps(out + (12 + i) * to, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
#else
    for (int c = 0; c < 16; ++c)
        for (int r = 0; r < 16; ++r) std::memcpy(out + c * to + r, in + r * from + c, 4);
#endif
}

// sums[i] = the sum of the lanes of v[i], of 16 vectors; or add it.
static inline void sum_lanes(const Vec* v, bool to_sums, float* sums) {
#if defined(__AVX512F__)
    // Neighbours are added and packed into one vector until each holds sums of four of its own.
    const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
    __m512 r[16];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        r[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
        r[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                   _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i)
        r[i] = add(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x44),
                   _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xee));
    const Vec sum = (Vec)add(_mm512_shuffle_f32x4(r[0], r[1], 0x88),
                             _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
    store(sums, to_sums ? load(sums) + sum : sum);
#else
    for (int i = 0; i < 16; ++i) {
        float sum = to_sums ? sums[i] : 0.0f;
        for (int l = 0; l < kLanes; ++l) sum += v[i][l];
        sums[i] = sum;
    }
#endif
}
