// GELU and its derivative on vectors, with errors of a few 1e-7.
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

// The standard normal distribution function. Half of erfc(|x| / sqrt 2), whose relative error is
// 1.2e-7 everywhere (Press et al., Numerical Recipes, erfcc).
static inline Vec normal(Vec x) {
    const Vec z = floats(bits(x) & 0x7fffffff) * 0.70710678f;
    const Vec t = 1.0f / (z * 0.5f + 1.0f);
    Vec p = splat(0.17087277f);
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const Vec tail = t * exponential(p - z * z) * 0.5f;
    return choose(x < 0.0f, tail, 1.0f - tail);
}

static inline Vec logistic(Vec x) { return 1.0f / (exponential(-x) + 1.0f); }

static inline Vec activate(Vec x, int32_t kind) {
    if (kind == kGelu) return x * normal(x);
    return x * logistic((x * x * 0.044715f + 1.0f) * x * 1.5957691216f);
}

static inline Vec slope(Vec x, int32_t kind) {
    if (kind == kGelu) return normal(x) + x * (exponential(x * x * -0.5f) * 0.39894228f);
    x = choose(x > 30.0f, splat(30.0f), choose(x < -30.0f, splat(-30.0f), x));  // x^3 overflows
    const Vec s = logistic((x * x * 0.044715f + 1.0f) * x * 1.5957691216f);
    return s + x * s * (1.0f - s) * ((x * x * 0.134145f + 1.0f) * 1.5957691216f);
}
