// Products of blocks of multiples of 16: 16 outputs are the vector, and inputs the scalars.
//
// Inputs lie in panels, 16 features token after token (pack.h), so that what 16 tokens have of a
// block is near; weights lie as [outputs / 16][units][16]. Sums leave as rows, with no transposing.
#pragma once

#include "multiply.h"
#include "pack.h"
#include "scratch.h"

constexpr int kPanelTokens = kLanes == 16 ? 16 : 4;  // whose sums are held at once
constexpr int kPanelUnits = 128;  // of weights that stay in L1 while tokens come by
constexpr int kPanelOutputs = 64;  // the same, whose weights are met by tokens in turn
constexpr int kScattered = 32;    // units of a block whose inputs CPUs do not fetch ahead

// sums [P panels][room][16] (+)= inputs of T tokens * blocks first .. last, for P * 16 outputs.
template <typename Lane, int P, int T, bool kFetch>
static inline void add_panel(const Weights& w, int64_t first, int64_t last, int output,
                             const float* x, int64_t room, bool add, float* sums) {
    constexpr int parts = kPanel / kLanes, width = kPanel / Lane::kPerUnit;  // units of a panel
    const int64_t size = static_cast<int64_t>(w.outputs) * w.units, next_panel = w.units * kPanel;
    Vec acc[T][P * parts];
    UNROLL
    for (int t = 0; t < T; ++t)
        UNROLL
        for (int p = 0; p < P * parts; ++p) acc[t][p] = Vec{};
    if (add)
        UNROLL
        for (int t = 0; t < T; ++t)
            UNROLL
            for (int p = 0; p < P * parts; ++p)
                acc[t][p] = load(sums + p / parts * room * kPanel + t * kPanel + p % parts * kLanes);
    for (int64_t b = first; b < last; ++b) {
        const float* weight = w.values + (b - w.from) * size + static_cast<int64_t>(output) * w.units;
        const float* in = x + static_cast<int64_t>(w.order.columns[b]) * w.units * kTile;
        const float* after =
            x + static_cast<int64_t>(w.order.columns[b + 1 < last ? b + 1 : b]) * w.units * kTile;
        for (int unit = 0; unit < w.units; unit += width, in += width * kTile) {
            const float* next = unit + width < w.units ? in + width * kTile : after;
            UNROLL
            for (int u = 0; u < width; ++u, weight += kPanel) {
                if (kFetch && u * 16 < T * width) __builtin_prefetch(next + u * 16);
                Vec each[P * parts];
                UNROLL
                for (int p = 0; p < P * parts; ++p)
                    each[p] = load(weight + p / parts * next_panel + p % parts * kLanes);
                UNROLL
                for (int t = 0; t < T; ++t) {
                    const Vec scalar = splat(in[t * width + u]);
                    UNROLL
                    for (int p = 0; p < P * parts; ++p)
                        acc[t][p] = Lane::dot(acc[t][p], each[p], scalar);
                }
            }
        }
    }
    UNROLL
    for (int t = 0; t < T; ++t)
        UNROLL
        for (int p = 0; p < P * parts; ++p)
            store(sums + p / parts * room * kPanel + t * kPanel + p % parts * kLanes, acc[t][p]);
}

// sums [outputs / 16][room][16] (+)= blocks first .. last of a block row * the tiles of tokens.
template <typename Lane>
static void add_panels(const Weights& w, int64_t first, int64_t last, int64_t tokens, int64_t room,
                       bool add, float* sums) {
    constexpr int width = kPanel / Lane::kPerUnit, half = kPanelTokens / 2;
    const int64_t size = static_cast<int64_t>(w.outputs) * w.units;
    const int64_t near = std::max(1, kPanelUnits / w.units);
    const int64_t groups = ceil_div(tokens, kPanelTokens);
    const bool scattered = w.units <= kScattered;
    // Two panels at once load less for each product, with half as many tokens.
    const bool two = kPanelTokens == 16 && w.outputs % (2 * kPanel) == 0;
    for (int64_t b = first; b == first || b < last; b += near) {
        const int64_t end = std::min(b + near, last);
        const float* next = w.values + (end - w.from) * size;  // fetched while others are used
        const float* fetched = w.values + (std::min(end + near, w.to) - w.from) * size;
        const int64_t lines = ceil_div((fetched - next) / 16, groups);
        for (int chunk = 0; chunk < w.outputs; chunk += kPanelOutputs)
            for (int64_t t = 0; t < groups * kPanelTokens; t += kPanelTokens) {
                for (int64_t i = 0; i < lines && next < fetched; ++i, next += 16)
                    __builtin_prefetch(next, 0, 2);
                const float* x = w.x.data + t / kTile * w.x.step + t % kTile * width;
                const int outputs = std::min(w.outputs, chunk + kPanelOutputs);
                for (int output = chunk; output < outputs; output += two ? 2 * kPanel : kPanel) {
                    float* to = sums + (output * room / kPanel + t) * kPanel;
                    const auto sum = [&](auto by, auto by_fetching, const float* in, float* at) {
                        (scattered ? by_fetching : by)(w, b, end, output, in, room,
                                                       add || b > first, at);
                    };
                    if (two) {
                        sum(add_panel<Lane, 2, half, false>, add_panel<Lane, 2, half, true>, x, to);
                        sum(add_panel<Lane, 2, half, false>, add_panel<Lane, 2, half, true>,
                            x + half * width, to + half * kPanel);
                    } else {
                        sum(add_panel<Lane, 1, kPanelTokens, false>,
                            add_panel<Lane, 1, kPanelTokens, true>, x, to);
                    }
                }
            }
    }
}

// sums [features / 16][room][16] -> features `first` and on of tokens start .. end.
static void put_panels(const float* sums, int64_t first, int64_t features, int64_t start,
                       int64_t end, int64_t room, const Output& out) {
    const bool plain = !out.inputs && out.activation == kNone;
    alignas(64) float row[kPanel], bias[kPanel] = {};
    for (int64_t from = start; from < end; from += 16)
        for (int64_t f = 0; f < features; f += kPanel) {
            const int count = static_cast<int>(std::min<int64_t>(16, end - from));
            const float* rows = sums + (f / kPanel * room + from - start) * kPanel;
            if (plain) {
                if (out.bias) read(out.bias, first + f, out.half, kPanel, bias);
                put_square(rows, bias, from, first + f, count, kPanel, out);
                continue;
            }
            for (int i = 0; i < count; ++i, rows += kPanel) {
                std::memcpy(row, rows, sizeof(row));
                put_row(row, from + i, first + f, kPanel, out);
            }
        }
}
