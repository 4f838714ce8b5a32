// The history by XMX: a built-in multiplies 4 or 8 query heads with 16 tokens or coordinates, f16 operands, sums in f32.
// A lane has a column of the first operand, an element of a vector for each row, and of the second a column of pairs of
// rows. Rows that are no query head's are zero.
// XMX is taken where states are f16 and a sub-group may have 16 lanes for it: there the built-ins of tf32 are, too. On
// chips where it has to be 8, DG2 and Arrow Lake, the plain form stays.
#define HALF_half 1
#define IS_HALF(type) PASTE(HALF_, type)
#if defined(cl_intel_subgroup_matrix_multiply_accumulate) && defined(cl_intel_subgroup_matrix_multiply_accumulate_tf32)
#if IS_HALF(REAL)
#define XMX
#endif
#endif

#ifdef XMX
#define CHUNKS (HEAD_DIM / 16)  // of coordinates that are multiplied at once
#define UNIT(largest) (fmax(largest, 1e-30f) * 0x1p-15f)  // of f16s that have the largest and, in full, the smallest
#if HEADS > 4
#define FLOATS float8  // one for each row
#define SHORTS short8
#else
#define FLOATS float4
#define SHORTS short4
#endif

// A code c of b bits is multiplied as the f16 that is 2^b + c: c are its mantissa's highest bits. What it is above c less
// the middle is the same everywhere, and what a sum has of it is taken off before.
#define SURPLUS(bits, middle) ((float)(1 << (bits)) + (middle))
#define EXPONENTS(bits) ((uint)(15 + (bits)) * (0x00010001u << 10))
#define KEY_BITS (KEY_FIRST + KEY_SECOND)
#define VALUE_BITS (VALUE_FIRST + VALUE_SECOND)
#define VALUE_LOW (HEAD_DIM / 8 * VALUE_FIRST)  // where their low bits are

// Of two runs of 8 codes at the most, side by side the first 16 bits, and those behind them.
inline uint2 beside(uint one, uint other) {
  return (uint2)((one & 0xffffu) | other << 16, one >> 16 | (other & 0xffff0000u));
}

// Codes n of both, from bit `to` on of each half.
inline uint both(uint2 runs, int width, int n, int to) {
  const int at = width * n;
  return ((at < 16 ? runs.x : runs.y) >> at % 16 & ((1u << width) - 1) * 0x00010001u) << to;
}

// The two runs of 8 codes that a plane has for 16 coordinates.
inline uint2 runs_of(const __global uchar* plane, int width, int chunk) {
  if (width == 4) return beside(((const __global uint*)plane)[2 * chunk], ((const __global uint*)plane)[2 * chunk + 1]);
  const uint runs = width == 2 ? ((const __global uint*)plane)[chunk] : ((const __global ushort*)plane)[chunk];
  return beside(runs & ((1u << 8 * width) - 1), runs >> 8 * width);
}

// 16 coordinates of a lane's key, the ones 8 apart side by side.
inline int8 key_pairs(const __global uchar* bytes, int chunk) {
  const uint2 high = runs_of(bytes, KEY_FIRST, chunk);
  const uint2 low = KEY_SECOND ? runs_of(bytes + HEAD_DIM / 8 * KEY_FIRST, KEY_SECOND, chunk) : (uint2)(0);
  int8 pairs;
  _Pragma("unroll") for (int p = 0; p < 8; p++) {
    uint pair = EXPONENTS(KEY_BITS) | both(high, KEY_FIRST, p, 10 - KEY_FIRST);
    if (KEY_SECOND) pair |= both(low, KEY_SECOND, p, 10 - KEY_BITS);
    pairs[p] = (int)pair;
  }
  return pairs;
}

inline const __global uchar* values_of(__global REAL* state, uint head, int token) {
  return codes_of(state, head, token) + HEAD_DIM / 8 * KEY_BITS;
}

// What attend does with a share of the history. `turned` are the queries of this sub-group.
inline void attend_by_xmx(__global REAL* state, uint head, const __global REAL* shown, int begin, int stride, int older,
                          const __local float (*turned)[HEAD_DIM], float* top, float* sum, float (*context)[SHARE]) {
  const uint lane = get_sub_group_local_id();
  float units[HEADS];  // of a query's coordinates
  FLOATS before = 0;
  SHORTS queries[CHUNKS];
  _Pragma("unroll") for (int c = 0; c < CHUNKS; c++) queries[c] = 0;
  _Pragma("unroll") for (int g = 0; g < HEADS; g++) {
    float largest = 0, along = 0;
    for (int c = 0; c < CHUNKS; c++) largest = fmax(largest, fabs(turned[g][16 * c + lane]));
    units[g] = UNIT(sub_group_reduce_max(largest));
    _Pragma("unroll") for (int c = 0; c < CHUNKS; c++) {
      const half x = (half)(turned[g][16 * c + lane / 2 + 8 * (lane & 1)] / units[g]);
      queries[c][g] = as_short(x);
      along += (float)x;
    }
    before[g] = -SURPLUS(KEY_BITS, KEY_MIDDLE) * sub_group_reduce_add(along);
  }
  const int8 surplus = (int8)(as_int((half2)((half)-SURPLUS(VALUE_BITS, VALUE_MIDDLE))));
  FLOATS contexts[SHARE];
  FOR_SHARE contexts[i] = 0;
  float unit = UNIT(0.0f);  // of contexts, by the largest scale of a value so far
  for (int first = begin; first < older; first += stride) {
    const int token = min(first + (int)lane, older - 1);
    const __global uchar* row = codes_of(state, head, token);
    FLOATS scores = before;
    _Pragma("unroll") for (int c = 0; c < CHUNKS; c++)
      scores = intel_sub_group_f16_f16_matrix_mad_k16(queries[c], key_pairs(row, c), scores);

    const float2 scales = scales_of(state, head, token);  // of the key, of the value
    const float larger_unit = fmax(unit, UNIT(sub_group_reduce_max(scales.y)));
    const bool seen = first + (int)lane < older && is_shown(shown, token);
    FLOATS old = 0;
    SHORTS weights = 0;
    _Pragma("unroll") for (int g = 0; g < HEADS; g++) {
      const float x = seen ? scores[g] * units[g] * scales.x : NOWHERE;
      const float larger = fmax(top[g], sub_group_reduce_max(x)), e = seen ? native_exp(x - larger) : 0;
      old[g] = native_exp(top[g] - larger);
      sum[g] = sum[g] * old[g] + e;  // of a lane's tokens
      top[g] = larger;
      weights[g] = as_short((half)(e * (scales.y / larger_unit)));
    }
    old *= unit / larger_unit;
    unit = larger_unit;

    uint2 high[8], low[8];  // of pairs of tokens
    _Pragma("unroll") for (int p = 0; p < 8; p++) {
      const __global uchar* one = values_of(state, head, min(first + 2 * p, older - 1));
      const __global uchar* other = values_of(state, head, min(first + 2 * p + 1, older - 1));
      high[p] = beside(share_of(one, VALUE_FIRST), share_of(other, VALUE_FIRST));
      if (VALUE_SECOND) low[p] = beside(share_of(one + VALUE_LOW, VALUE_SECOND), share_of(other + VALUE_LOW, VALUE_SECOND));
    }
    const FLOATS less = intel_sub_group_f16_f16_matrix_mad_k16(weights, surplus, (FLOATS)(0));
    FOR_SHARE {
      int8 pairs;  // of tokens
      _Pragma("unroll") for (int p = 0; p < 8; p++) {
        uint pair = EXPONENTS(VALUE_BITS) | both(high[p], VALUE_FIRST, i, 10 - VALUE_FIRST);
        if (VALUE_SECOND) pair |= both(low[p], VALUE_SECOND, i, 10 - VALUE_BITS);
        pairs[p] = (int)pair;
      }
      contexts[i] = intel_sub_group_f16_f16_matrix_mad_k16(weights, pairs, contexts[i] * old + less);
    }
  }
  _Pragma("unroll") for (int g = 0; g < HEADS; g++) {
    sum[g] = sub_group_reduce_add(sum[g]);
    FOR_SHARE context[g][i] = contexts[i][g] * unit;
  }
}
#endif
