// A sliding layer, exact: one new token attends to the sink, the window and itself; of several the last are kept.
//   state   the layer's: its scale, its sinks, and a ring of keys and values (2·KV_HEADS, WINDOW, HEAD_DIM)
//   step    of one that attends, queries (QUERY_HEADS, HEAD_DIM), key and value (KV_HEADS, HEAD_DIM) each; of several,
//           keys and values of the last WINDOW tokens (2·KV_HEADS, WINDOW, HEAD_DIM)
//   facts   of one that attends, in a row, whether each of the last WINDOW tokens is shown, and the number of past ones;
//           of several, in a column, the numbers of past and of new ones
//   output  (QUERY_HEADS, HEAD_DIM); or zero, in its first element
inline size_t place(uint head, int token) { return RING + ((size_t)head * WINDOW + token % WINDOW) * HEAD_DIM; }

inline void keep(__global REAL* state, const __global REAL* step, uint row, int end, int count) {
  const uint head = row / WINDOW;
  const int token = end - WINDOW + (int)(row % WINDOW);
  if (head >= KV_HEADS || token < end - count) return;
  for (uint i = get_local_id(0); i < 2 * HEAD_DIM; i += LANES * SUB_GROUPS) {
    const uint of = i < HEAD_DIM ? head : KV_HEADS + head, n = i % HEAD_DIM;
    state[place(of, token) + n] = step[((size_t)of * WINDOW + row % WINDOW) * HEAD_DIM + n];
  }
}

__attribute__((intel_reqd_sub_group_size(LANES)))
__kernel void ovtq_window(__global REAL* state, const __global REAL* step, const __global int* facts,
                          __global OUTPUT0_TYPE* output) {
  const uint lane = get_sub_group_local_id(), me = get_sub_group_id(), query_head = get_group_id(0);
  __local float joined[SUB_GROUPS][HEAD_DIM + 2];
  if (INPUT2_DIMS[2] == 2) {
    if (get_global_id(0) == 0) output[0] = (OUTPUT0_TYPE)0;
    keep(state, step, query_head, facts[0] + facts[1], facts[1]);
    return;
  }

  const uint head = query_head / GROUP;
  const int past = facts[WINDOW];
  const __global REAL* keys = step + QUERY_HEADS * HEAD_DIM + head * HEAD_DIM;
  const __global REAL* values = keys + KV_HEADS * HEAD_DIM;
  const float scale = (float)state[SCALE] + (float)state[SCALE + 1];
  float query[SHARE], key[SHARE], value[SHARE], context[SHARE], top = NOWHERE, sum = 0;
  load(query, step + query_head * HEAD_DIM);
  FOR_SHARE {
    query[i] *= scale;
    context[i] = value[i] = 0;
  }
  if (me == 0) add((float)state[SINKS + 2 * query_head] + (float)state[SINKS + 2 * query_head + 1], value, &top, &sum, context);
  const int first = past - (WINDOW - 1);
  for (int token = max(first, 0) + (int)me; token <= past; token += SUB_GROUPS) {
    if (facts[token - first] == 0) continue;
    load(key, token < past ? state + place(head, token) : keys);
    load(value, token < past ? state + place(KV_HEADS + head, token) : values);
    float score = 0;
    FOR_SHARE score += query[i] * key[i];
    add(sub_group_reduce_add(score), value, &top, &sum, context);
  }
  if (query_head % GROUP == 0 && me == 0) {  // nobody reads that place in this step
    FOR_SHARE state[place(head, past) + SHARE * lane + i] = keys[SHARE * lane + i];
    FOR_SHARE state[place(KV_HEADS + head, past) + SHARE * lane + i] = values[SHARE * lane + i];
  }
  FOR_SHARE joined[me][SHARE * lane + i] = context[i];
  if (lane == 0) {
    joined[me][HEAD_DIM] = top;
    joined[me][HEAD_DIM + 1] = sum;
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  if (me > 0) return;
  float largest = NOWHERE, total = 0;
  for (int n = 0; n < SUB_GROUPS; n++) largest = fmax(largest, joined[n][HEAD_DIM]);
  FOR_SHARE context[i] = 0;
  for (int n = 0; n < SUB_GROUPS; n++) {
    const float factor = native_exp(joined[n][HEAD_DIM] - largest);
    total += factor * joined[n][HEAD_DIM + 1];
    FOR_SHARE context[i] += factor * joined[n][SHARE * lane + i];
  }
  FOR_SHARE output[query_head * HEAD_DIM + SHARE * lane + i] = (OUTPUT0_TYPE)(context[i] / total);
}
