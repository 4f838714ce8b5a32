// Several new tokens: append them. A sub-group takes one token of one KV head.
//   state   the layer's; before the first token there is nothing in it, and the constants are written, too
//   step    the numbers of past and of new tokens, as high and low each, and a number that is not read; the constants;
//           then, with as many tokens as there are rows, padding included, keys and values (KV_HEADS, tokens, HEAD_DIM)
//   output  zero, in its first element
__attribute__((intel_reqd_sub_group_size(LANES)))
__kernel void ovtq_append(__global REAL* state, const __global REAL* step, __global OUTPUT0_TYPE* output) {
  const uint task = get_group_id(0) * SUB_GROUPS + get_sub_group_id(), head = task % KV_HEADS, token = task / KV_HEADS;
  const uint rows = (INPUT1_DIMS[0] - 1 - GIVEN_FIVES) / TOKEN_FIVES;
  const int past = count_of(step[0], step[1]), count = count_of(step[2], step[3]);
  const __global REAL* given = step + 5;
  if (get_global_id(0) == 0) output[0] = (OUTPUT0_TYPE)0;
  if (past == 0) keep_constants(state, given);
  if ((int)token >= count || past + (int)token >= CAPACITY) return;
  const __global REAL* keys = given + 5 * GIVEN_FIVES;
  const __global REAL* values = keys + (size_t)KV_HEADS * rows * HEAD_DIM;
  float key[SHARE], value[SHARE];
  load_key(key, keys + ((size_t)head * rows + token) * HEAD_DIM, given, head);
  load_value(value, values + ((size_t)head * rows + token) * HEAD_DIM, given, head);
  store(state, head, past + token, key, value, (int)token + SLOTS > count);
}
