// GELU and its derivative on vectors; absolute errors of a few 1e-7.
#pragma once

#include "lanes.h"

enum Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2 };

// e^x; arguments beyond those of normal floats are clamped, NaN stays NaN.
static inline Vec exponential(Vec x) {
    x = choose(x > 88.0f, splat(88.0f), x);
    x = choose(x < -87.0f, splat(-87.0f), x);
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = x * 1.44269504f + shift;
    const Vec whole = n - shift;
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);  // Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return floats(bits(p) + (bits(n) << 23));
}

// Phi(x), with phi(x) = Phi'(x). Abramowitz and Stegun 7.1.26.
static inline Vec normal(Vec x, Vec* density) {
    const Vec bell = exponential(x * x * -0.5f);
    const Vec z = floats(bits(x) & 0x7fffffff) * 0.70710678f;
    const Vec t = 1.0f / (z * 0.3275911f + 1.0f);
    Vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vec tail = p * t * bell * 0.5f;
    *density = bell * 0.39894228f;
    return choose(x < 0.0f, tail, 1.0f - tail);
}

static inline Vec logistic(Vec x) { return 1.0f / (exponential(-x) + 1.0f); }

static inline Vec activate(Vec x, int32_t kind) {
    if (kind == kGelu) {
        Vec density;
        return x * normal(x, &density);
    }
    return x * logistic((x * x * 0.044715f + 1.0f) * x * 1.5957691216f);
}

static inline Vec slope(Vec x, int32_t kind) {
    if (kind == kGelu) {
        Vec density;
        const Vec share = normal(x, &density);
        return share + x * density;
    }
    const Vec s = logistic((x * x * 0.044715f + 1.0f) * x * 1.5957691216f);
    return s + x * s * (1.0f - s) * ((x * x * 0.134145f + 1.0f) * 1.5957691216f);
}
