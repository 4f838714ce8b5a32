// The past as attention reads it: keys (times the scale) and values of the model, zero where there are none.
//   counts  how many tokens are past, as high and low
//   scratch (2·KV_HEADS, rows, HEAD_DIM), keys first: what is written
inline void read_past(__global REAL* state, const __global REAL* counts, __global REAL* scratch, uint rows) {
  const uint lane = get_sub_group_local_id(), tasks = KV_HEADS * rows;
  const int count = min(count_of(counts[0], counts[1]), CAPACITY), older = max(count - WINDOW, 0);
  const uint all = get_num_groups(0) * SUB_GROUPS;
  for (uint task = get_group_id(0) * SUB_GROUPS + get_sub_group_id(); task < tasks; task += all) {
    const uint head = task / rows, row = task % rows;
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
    if ((int)row < count) {
      turn(key, matrix(state, KEY_RETURNS, head));
      turn(value, matrix(state, VALUE_RETURNS, head));
      FOR_SHARE key[i] += (float)centre(state, KEY_CENTRES, head)[SHARE * lane + i];
      FOR_SHARE value[i] += (float)centre(state, VALUE_CENTRES, head)[SHARE * lane + i];
    }
    __global REAL* at = scratch + (size_t)task * HEAD_DIM + SHARE * lane;
    FOR_SHARE at[i] = (REAL)key[i];
    FOR_SHARE at[(size_t)tasks * HEAD_DIM + i] = (REAL)value[i];
  }
}
