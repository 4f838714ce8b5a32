// The past as attention reads it: keys (times the scale) and values of the model, zero where there are none.
// A work-group takes READ_ROWS rows of one KV head, a sub-group one row at a time.
//   state   the layer's
//   unused  tells how many rows to read, to OpenVINO
//   past    how many tokens there are
//   output  (2·KV_HEADS, rows, HEAD_DIM), keys first
__attribute__((intel_reqd_sub_group_size(LANES)))
__kernel void ovtq_read(__global REAL* state, const __global INPUT1_TYPE* unused, const __global int* past,
                        __global OUTPUT0_TYPE* output) {
  const uint lane = get_sub_group_local_id(), head = get_group_id(0) % KV_HEADS;
  const uint rows = INPUT2_DIMS[0] / KV_HEADS * READ_ROWS, first = get_group_id(0) / KV_HEADS * READ_ROWS;
  const int count = min(past[0], CAPACITY), older = max(count - WINDOW, 0);
  for (uint row = first + get_sub_group_id(); row < first + READ_ROWS; row += SUB_GROUPS) {
    float key[SHARE], value[SHARE];
    FOR_SHARE key[i] = value[i] = 0;
    if ((int)row < older) {
      const __global uchar* bytes = codes_of(state, head, row);
      read_codes(bytes, KEY_FIRST, KEY_SECOND, KEY_MIDDLE, key);
      read_codes(bytes + HEAD_DIM / 8 * (KEY_FIRST + KEY_SECOND), VALUE_FIRST, VALUE_SECOND, VALUE_MIDDLE, value);
      const float2 scales = scales_of(state, head, row);  // of the key, of the value
      FOR_SHARE key[i] *= scales.x;
      FOR_SHARE value[i] *= scales.y;
    } else if ((int)row < count) {
      load_recent(key, value, state, head, row);
    }
    turn(key, matrix(state, KEY_RETURNS, head));
    turn(value, matrix(state, VALUE_RETURNS, head));
    __global OUTPUT0_TYPE* at = output + ((size_t)head * rows + row) * HEAD_DIM + SHARE * lane;
    if ((int)row < count) {
      FOR_SHARE key[i] += (float)centre(state, KEY_CENTRES, head)[SHARE * lane + i];
      FOR_SHARE value[i] += (float)centre(state, VALUE_CENTRES, head)[SHARE * lane + i];
    }
    FOR_SHARE at[i] = (OUTPUT0_TYPE)key[i];
    FOR_SHARE at[(size_t)KV_HEADS * rows * HEAD_DIM + i] = (OUTPUT0_TYPE)value[i];
  }
}
