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
        for (int r = 0; r < 16; ++r) out[c * to + r] = in[r * from + c];
#endif
}

// sums[i] = the sum of the lanes of v[i], of 16 vectors.
static inline void sum_lanes(const Vec* v, float* sums) {
#if defined(__AVX512F__)
    // Each step adds the halves of two vectors and packs both sums into one vector.
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 other = _mm512_mask_blend_ps(0x0f0f, v[i], v[i + 8]);
        a[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, v[i], v[i + 8]),
                             _mm512_shuffle_f32x4(other, other, 0xb1));
    }
    for (int i = 0; i < 4; ++i)
        b[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a[i], a[i + 4]),
                             _mm512_shuffle_f32x4(a[i], a[i + 4], 0x4e));
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, b[i], b[i + 2]),
                             _mm512_shuffle_ps(b[i], b[i + 2], 0x4e));
    const __m512 last = _mm512_mask_blend_ps(0x5555, c[0], c[1]);
    const __m512 d = _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, c[0], c[1]),
                                   _mm512_permute_ps(last, 0xb1));
    // Where the sum of v[i] has come to.
    const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
    _mm512_storeu_ps(sums, _mm512_permutexvar_ps(at, d));
#else
    for (int i = 0; i < 16; ++i) {
        float sum = 0;
        for (int l = 0; l < kLanes; ++l) sum += v[i][l];
        sums[i] = sum;
    }
#endif
}
