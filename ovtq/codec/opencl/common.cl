// What the kernels of packed layers share.
#define SLOTS (WINDOW + 1)           // of the ring: while the new token is written, all of the window can be read
#define RING_ROW (4 * HEAD_DIM)      // its key, its value, and of both what an element less than a float leaves off
// The query heads of a KV head are split among as many sub-groups as have registers for their contexts; HEADS are those
// of one, TEAMS how many times a work-group has all of them.
#define SPLIT (GROUP * HEAD_DIM <= 512 ? 1 : GROUP * HEAD_DIM <= 1024 ? 2 : 4)
#define HEADS ((GROUP + SPLIT - 1) / SPLIT)
#define TEAMS (SUB_GROUPS / SPLIT)

// The state of a layer: constants, codes and scales of all tokens, the last tokens as they came. Offsets are in its
// elements.
// Of a KV head: what queries, keys and values are multiplied with, and what turns keys and values back.
inline const __global REAL* matrix(const __global REAL* constants, int of, uint head) {
  return constants + of + (size_t)head * HEAD_DIM * HEAD_DIM;
}

inline const __global REAL* centre(const __global REAL* constants, int of, uint head) {
  return constants + of + head * HEAD_DIM;
}

inline void keep_constants(__global REAL* state, const __global REAL* given) {
  for (uint i = get_global_id(0); i < CODES; i += get_global_size(0)) state[i] = given[i];
}

// Of what `attend` is given of all tokens.
inline bool is_shown(const __global REAL* shown, uint token) { return (uint)shown[token / 8] >> token % 8 & 1; }

inline __global uchar* codes_of(__global REAL* state, uint head, uint token) {
  return (__global uchar*)(state + CODES + ((size_t)head * CAPACITY + token) * CODES_ROW);
}

// The scales of a key and its value, floats of 24 bits: the high 16 of both in one place, the low 8 in another. Where an
// element is a float they are that.
#define WIDE_float 1
#define IS_WIDE(type) PASTE(WIDE_, type)
#if IS_WIDE(REAL)
inline float2 scales_of(const __global REAL* state, uint head, uint token) {
  return vload2((size_t)head * CAPACITY + token, (const __global float*)(state + HIGH_SCALES));
}

inline void write_scales(__global REAL* state, uint head, uint token, float key, float value) {
  vstore2((float2)(key, value), (size_t)head * CAPACITY + token, (__global float*)(state + HIGH_SCALES));
}
#else
inline float2 scales_of(const __global REAL* state, uint head, uint token) {
  const size_t at = (size_t)head * CAPACITY + token;
  const uint high = ((const __global uint*)(state + HIGH_SCALES))[at];
  const uint low = ((const __global ushort*)(state + LOW_SCALES))[at];
  return (float2)(as_float(high << 16 | (low & 0xff) << 8), as_float((high & 0xffff0000u) | (low & 0xff00)));
}

inline void write_scales(__global REAL* state, uint head, uint token, float key, float value) {
  const size_t at = (size_t)head * CAPACITY + token;
  const uint k = as_uint(key) + 0x80, v = as_uint(value) + 0x80;  // to the nearest
  ((__global uint*)(state + HIGH_SCALES))[at] = k >> 16 | (v & 0xffff0000u);
  ((__global ushort*)(state + LOW_SCALES))[at] = (ushort)((k >> 8 & 0xff) | (v & 0xff00));
}
#endif

inline __global REAL* ring_row(__global REAL* state, uint head, uint token) {
  return state + RING + ((size_t)head * SLOTS + token % SLOTS) * RING_ROW;
}

// x·matrix, the matrix by rows.
inline void turn(float* x, const __global REAL* matrix) {
  const uint lane = get_sub_group_local_id();
  float y[SHARE];
  FOR_SHARE y[i] = 0;
  for (int from = 0; from < LANES; from++) {
    _Pragma("unroll") for (int k = 0; k < SHARE; k++) {
      const float value = sub_group_broadcast(x[k], from);
      const __global REAL* row = matrix + (SHARE * from + k) * HEAD_DIM + SHARE * lane;
      FOR_SHARE y[i] += value * (float)row[i];
    }
  }
  FOR_SHARE x[i] = y[i];
}

// (scale·key − centre)·matrix and (value − centre)·matrix: as they are quantised. Constants are those of a state, or
// those that it is given.
inline void load_key(float* x, const __global REAL* source, const __global REAL* constants, uint head) {
  const uint lane = get_sub_group_local_id();
  const float scale = (float)constants[SCALE] + (float)constants[SCALE + 1];
  const __global REAL* middle = centre(constants, KEY_CENTRES, head);
  FOR_SHARE x[i] = scale * (float)source[SHARE * lane + i] - (float)middle[SHARE * lane + i];
  turn(x, matrix(constants, KEY_BASES, head));
}

inline void load_value(float* x, const __global REAL* source, const __global REAL* constants, uint head) {
  const uint lane = get_sub_group_local_id();
  const __global REAL* middle = centre(constants, VALUE_CENTRES, head);
  FOR_SHARE x[i] = (float)source[SHARE * lane + i] - (float)middle[SHARE * lane + i];
  turn(x, matrix(constants, VALUE_BASES, head));
}

// Codes less their middle, and the scale: ovtq.codec.AdaptiveUniform.
inline float encode(const float* x, float* code, float middle, float peak, float spread) {
  float top = 0, square = 0, sum = 0;
  FOR_SHARE { top = fmax(top, fabs(x[i])); square += x[i] * x[i]; }
  const float norm = sqrt(sub_group_reduce_add(square));
  top = peak * sub_group_reduce_max(top) + spread * norm / sqrt((float)HEAD_DIM) + FLOOR;
  FOR_SHARE {
    code[i] = rint(clamp(x[i] / top, -1.0f, 1.0f) * middle + middle) - middle;
    sum += code[i] * code[i];
  }
  return norm / sqrt(sub_group_reduce_add(sum));
}

// Some bits of every code lie together in a plane: coordinate n in bits width·n and up. A lane's share is one number.
inline uint share_of(const __global uchar* plane, int width) {
  const uint lane = get_sub_group_local_id(), bits = SHARE * width;
  if (bits == 32) return ((const __global uint*)plane)[lane];
  if (bits == 16) return ((const __global ushort*)plane)[lane];
  if (bits == 8) return plane[lane];
  return plane[lane / 2] >> (4 * (lane & 1));
}

inline void write_share(__global uchar* plane, int width, uint share) {
  const uint lane = get_sub_group_local_id(), bits = SHARE * width;
  if (bits == 32) ((__global uint*)plane)[lane] = share;
  if (bits == 16) ((__global ushort*)plane)[lane] = (ushort)share;
  if (bits == 8) plane[lane] = (uchar)share;
  if (bits == 4) {
    const uint other = intel_sub_group_shuffle_xor(share, 1);
    if ((lane & 1) == 0) plane[lane / 2] = (uchar)(share | other << 4);
  }
}

inline void write_plane(__global uchar* plane, int width, int shift, const float* code, float middle) {
  uint share = 0;
  FOR_SHARE share |= (((uint)(code[i] + middle) >> shift) & ((1u << width) - 1)) << (width * i);
  write_share(plane, width, share);
}

// Codes of a lane's share, less their middle.
inline void read_codes(const __global uchar* row, int first, int second, float middle, float* code) {
  const uint high = share_of(row, first), low = second ? share_of(row + HEAD_DIM / 8 * first, second) : 0;
  FOR_SHARE {
    uint c = (high >> (first * i)) & ((1u << first) - 1);
    if (second) c = c << second | ((low >> (second * i)) & ((1u << second) - 1));
    code[i] = (float)c - middle;
  }
}

// Write a token: packed, and as it came if `recent`.
inline void store(__global REAL* state, uint head, uint token, float* key, float* value, bool recent) {
  const uint lane = get_sub_group_local_id();
  __global uchar* bytes = codes_of(state, head, token);
  float code[SHARE];
  const float key_scale = encode(key, code, KEY_MIDDLE, KEY_PEAK, KEY_SPREAD);
  write_plane(bytes, KEY_FIRST, KEY_SECOND, code, KEY_MIDDLE);
  if (KEY_SECOND) write_plane(bytes + HEAD_DIM / 8 * KEY_FIRST, KEY_SECOND, 0, code, KEY_MIDDLE);
  bytes += HEAD_DIM / 8 * (KEY_FIRST + KEY_SECOND);
  const float value_scale = encode(value, code, VALUE_MIDDLE, VALUE_PEAK, VALUE_SPREAD);
  write_plane(bytes, VALUE_FIRST, VALUE_SECOND, code, VALUE_MIDDLE);
  if (VALUE_SECOND) write_plane(bytes + HEAD_DIM / 8 * VALUE_FIRST, VALUE_SECOND, 0, code, VALUE_MIDDLE);
  if (lane == 0) write_scales(state, head, token, key_scale, value_scale);
  if (recent) {
    __global REAL* entry = ring_row(state, head, token) + SHARE * lane;
    FOR_SHARE {
      entry[i] = (REAL)key[i];
      entry[HEAD_DIM + i] = (REAL)value[i];
      entry[2 * HEAD_DIM + i] = (REAL)(key[i] - (float)entry[i]);
      entry[3 * HEAD_DIM + i] = (REAL)(value[i] - (float)entry[HEAD_DIM + i]);
    }
  }
}

// A recent token as it came.
inline void load_recent(float* key, float* value, __global REAL* state, uint head, uint token) {
  const __global REAL* entry = ring_row(state, head, token) + SHARE * get_sub_group_local_id();
  FOR_SHARE {
    key[i] = (float)entry[i] + (float)entry[2 * HEAD_DIM + i];
    value[i] = (float)entry[HEAD_DIM + i] + (float)entry[3 * HEAD_DIM + i];
  }
}
