// One pass each over the weights a rank holds. Plain C functions for topology/passes.py, whose
// torch and numpy passes are the specification: the results are the same bits.
//
// Sets are packed bits, the most significant bit of a byte first, as in topology/bits.py.

#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000, kTop = 0x7FFFFFFF;

// Kinds of keys, as in topology/keys.py.
enum Kind : int32_t { kLargest = 0, kSmallest = 1, kRandom = 2 };

template <int32_t kind>
inline uint32_t key_of(uint32_t x, uint32_t seed_low, uint32_t seed_high) {
    if (kind == kLargest) return x & kMagnitude;
    if (kind == kSmallest) return (x & kMagnitude) ^ kMagnitude;
    x ^= seed_low;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x ^= seed_high;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x & kMagnitude;
}

constexpr int64_t kChunk = 512;  // positions looked at at once

// 0/1 bytes into bits: of eight, the first and lowest becomes the highest bit of a byte.
inline void pack(const uint8_t* flags, uint8_t* packed) {
    uint64_t words[kChunk / 8];
    std::memcpy(words, flags, kChunk);
    for (int64_t b = 0; b < kChunk / 8; ++b)
        packed[b] = static_cast<uint8_t>((words[b] * 0x8040201008040201ull) >> 56);
}

}  // namespace

extern "C" {

struct Source {
    int32_t kind;
    uint32_t seed_low, seed_high;
    const uint32_t* values;  // fp32, read as integers; not looked at if the keys are random
    const uint8_t* candidates;
    int64_t start, numel;  // local position 0 in the layer, and how many there are
};

struct Bracket {
    int32_t low, high;     // keys, both included
    int32_t ties;          // one key: positions are counted, not keys
    int64_t first, last;   // canonical positions, both included
    int64_t width;         // keys or positions a bin
    int64_t base;          // canonical position of local position 0
};

}  // extern "C"

namespace {

// Counts what is inside a bracket, by bin.
template <typename Count>
class Bins {
public:
    Bins(const Bracket& at, Count* row) : at_(at), bins_(row + 2) {
        // Lemire, Kaser and Kurz 2019: an exact 32-bit quotient by a product. Keys are 31 bits.
        if (!at.ties && at.width > 1) inverse_ = ~0ull / static_cast<uint64_t>(at.width) + 1;
    }

    void add(int64_t place, int32_t key) {
        if (at_.ties) {
            const int64_t canonical = place + at_.base;
            if (canonical >= at_.first && canonical <= at_.last)
                bins_[(canonical - at_.first) / at_.width] += 1;
            return;
        }
        const uint64_t offset = static_cast<uint32_t>(key - at_.low);
        bins_[inverse_ ? (static_cast<unsigned __int128>(inverse_) * offset) >> 64 : offset] += 1;
    }

private:
    const Bracket at_;
    Count* bins_;
    uint64_t inverse_ = 0;  // of the width; 0: one
};

template <int32_t kind, typename Count>
int64_t scan_as(const Source& source, const Bracket& at, bool check, uint8_t* above,
                int32_t* places, int32_t* found, int64_t capacity, Count* row) {
    alignas(64) uint32_t keys[kChunk];
    alignas(64) uint8_t over[kChunk], within[kChunk];
    const int32_t low = at.low, high = at.high;
    uint32_t largest = 0;
    int64_t inside = 0, higher = 0;
    Bins<Count> bins(at, row);
    for (int64_t begin = 0; begin < source.numel; begin += kChunk) {
        const int64_t n = source.numel - begin < kChunk ? source.numel - begin : kChunk;
        if (kind == kRandom) {
            const uint32_t from = static_cast<uint32_t>(source.start + begin);
            for (int64_t i = 0; i < n; ++i)
                keys[i] = key_of<kind>(from + static_cast<uint32_t>(i), source.seed_low,
                                       source.seed_high);
        } else {
            const uint32_t* values = source.values + begin;
            uint32_t most = 0;
            for (int64_t i = 0; i < n; ++i) {
                const uint32_t magnitude = values[i] & kMagnitude;
                most = magnitude > most ? magnitude : most;
                keys[i] = kind == kSmallest ? magnitude ^ kMagnitude : magnitude;
            }
            largest = most > largest ? most : largest;
        }
        if (n < kChunk) std::memset(keys + n, 0, (kChunk - n) * sizeof(uint32_t));
        for (int64_t i = 0; i < kChunk; ++i) {
            const int32_t key = static_cast<int32_t>(keys[i]);
            over[i] = key > high;
            within[i] = (key >= low) & (key <= high);
        }
        // Candidates have no bits behind the last position.
        const uint8_t* candidates = source.candidates + begin / 8;
        const int64_t bytes = (n + 7) / 8;
        uint8_t mine[kChunk / 8] = {}, rest[kChunk / 8], up[kChunk / 8];
        std::memcpy(mine, candidates, bytes);
        pack(within, rest);
        pack(over, up);
        for (int64_t b = 0; b < kChunk / 8; ++b) {
            rest[b] &= mine[b];
            up[b] &= mine[b];
        }
        std::memcpy(above + begin / 8, up, bytes);
        for (int64_t w = 0; w < kChunk / 64; ++w) {
            uint64_t word;
            std::memcpy(&word, up + 8 * w, 8);
            higher += __builtin_popcountll(word);
            std::memcpy(&word, rest + 8 * w, 8);
            word = __builtin_bswap64(word);  // the first position is the highest bit
            while (word) {
                const int lead = __builtin_clzll(word);
                word &= ~(0x8000000000000000ull >> lead);
                const int32_t key = static_cast<int32_t>(keys[64 * w + lead]);
                const int64_t place = begin + 64 * w + lead;
                if (inside < capacity) {
                    places[inside] = static_cast<int32_t>(place);
                    found[inside] = key;
                }
                ++inside;
                bins.add(place, key);
            }
        }
    }
    if (check && kind != kRandom && largest >= kInfinity) row[0] += 1;
    row[1] += static_cast<Count>(higher);
    return inside;
}

template <typename Count>
int64_t scan_row(const Source& source, const Bracket& at, bool check, uint8_t* above,
                 int32_t* places, int32_t* found, int64_t capacity, Count* row) {
    switch (source.kind) {
        case kLargest:
            return scan_as<kLargest>(source, at, check, above, places, found, capacity, row);
        case kSmallest:
            return scan_as<kSmallest>(source, at, check, above, places, found, capacity, row);
        default:
            return scan_as<kRandom>(source, at, check, above, places, found, capacity, row);
    }
}

template <typename Count>
void count_row(const Bracket& at, const int32_t* places, const int32_t* found, int64_t n,
               Count* row) {
    Bins<Count> bins(at, row);
    for (int64_t i = 0; i < n; ++i)
        if (found[i] >= at.low && found[i] <= at.high) bins.add(places[i], found[i]);
}

template <typename Word>
void keep_words(const uint8_t* bits, int64_t numel, Word* values) {
    const int64_t whole = numel / 8;
    for (int64_t b = 0; b < whole; ++b) {
        const int32_t byte = static_cast<int32_t>(bits[b]) << 24;
        Word* at = values + 8 * b;
        for (int i = 0; i < 8; ++i)
            at[i] &= static_cast<Word>(static_cast<int32_t>(static_cast<uint32_t>(byte) << i) >> 31);
    }
    for (int64_t i = 8 * whole; i < numel; ++i)
        if (!(bits[i / 8] >> (7 - i % 8) & 1)) values[i] = 0;
}

}  // namespace

extern "C" {

// Rows count scores that are not finite, candidates above a bracket, and candidates in it by bin;
// in integers of `count_size` bytes.

// All a source holds against a bracket: bits of the candidates above it, how many, those inside by
// bin, and the first `capacity` of these (local position and key, ascending). Returns how many are
// inside.
int64_t scan(const Source* source, const Bracket* at, int32_t check, uint8_t* above,
             int32_t* places, int32_t* found, int64_t capacity, int32_t count_size, void* row) {
    if (count_size == 8)
        return scan_row(*source, *at, check, above, places, found, capacity,
                        static_cast<int64_t*>(row));
    return scan_row(*source, *at, check, above, places, found, capacity,
                    static_cast<int32_t*>(row));
}

// The same counts from what an earlier scan found.
void count(const Bracket* at, const int32_t* places, const int32_t* found, int64_t n,
           int32_t count_size, void* row) {
    if (count_size == 8)
        count_row(*at, places, found, n, static_cast<int64_t*>(row));
    else
        count_row(*at, places, found, n, static_cast<int32_t*>(row));
}

// Put what was found and is chosen into a set: keys above `low`, and those equal to it at local
// positions up to `last`.
void take(const int32_t* places, const int32_t* found, int64_t n, int32_t low, int64_t last,
          uint8_t* set) {
    for (int64_t i = 0; i < n; ++i)
        if (found[i] > low || (found[i] == low && places[i] <= last))
            set[places[i] / 8] |= 0x80u >> (places[i] % 8);
}

// Keys (plus one, and less than 2^31) of the candidates at every stride-th position of a layer.
void sample(const Source* source, int64_t stride, int32_t* slots) {
    const int64_t from = (source->start + stride - 1) / stride;
    for (int64_t slot = from; slot * stride < source->start + source->numel; ++slot) {
        const int64_t place = slot * stride - source->start;
        if (!(source->candidates[place / 8] >> (7 - place % 8) & 1)) continue;
        uint32_t key;
        if (source->kind == kRandom)
            key = key_of<kRandom>(static_cast<uint32_t>(slot * stride), source->seed_low,
                                  source->seed_high);
        else if (source->kind == kSmallest)
            key = key_of<kSmallest>(source->values[place], 0, 0);
        else
            key = key_of<kLargest>(source->values[place], 0, 0);
        slots[slot] = static_cast<int32_t>((key < kTop ? key : kTop - 1) + 1);
    }
}

// Make elements that are not in a set exactly 0, infinities and NaN too.
void keep_only(const uint8_t* bits, int64_t numel, void* values, int32_t element_size) {
    if (element_size == 2)
        keep_words(bits, numel, static_cast<uint16_t*>(values));
    else if (element_size == 4)
        keep_words(bits, numel, static_cast<uint32_t*>(values));
    else
        keep_words(bits, numel, static_cast<uint64_t*>(values));
}

}  // extern "C"
