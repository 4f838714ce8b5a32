// A sliding layer, exact: new tokens attend to the sink, the window and themselves, and the last of them are kept.
//   state   the layer's: its scale, its sinks, and a ring of keys and values (2·KV_HEADS, WINDOW, HEAD_DIM)
//   step    queries, keys and values of the tokens (QUERY_HEADS + 2·KV_HEADS, tokens, HEAD_DIM), and padding behind them:
//           a kernel is built for each number of rows, which are no fewer
//   facts   in a row: whether each token is shown, from the first that a window reaches to the last row; the numbers of
//           past and of new ones
//   output  (QUERY_HEADS, tokens, HEAD_DIM), and what stands for padding
// A work-group takes a query. Of several tokens, the first see the ring: those of a KV head are one work-group's, which
// writes into it when they are done.
typedef struct {
  __global REAL* state;
  const __global REAL *keys, *values;  // of the new tokens
  const __global int* shown;
  uint head;
  int past;
} Given;

inline __global REAL* place(const Given* given, uint of, int token) {
  const size_t head = of * KV_HEADS + given->head;
  return given->state + RING + (head * WINDOW + token % WINDOW) * HEAD_DIM;
}

// A query, of row `at` of those of a head, and every so many of the tokens that it sees.
inline void attend(const Given* given, const __global REAL* from, int at, int first, int stride, float* top, float* sum,
                   float* context) {
  const float scale = (float)given->state[SCALE] + (float)given->state[SCALE + 1];
  float query[SHARE], key[SHARE], value[SHARE];
  load(query, from);
  FOR_SHARE query[i] *= scale;
  const int end = given->past + at;
  for (int token = max(end - (WINDOW - 1), 0) + first; token <= end; token += stride) {
    const int row = token - given->past;
    if (given->shown[row + WINDOW - 1] == 0) continue;
    load(key, row < 0 ? place(given, 0, token) : given->keys + row * HEAD_DIM);
    load(value, row < 0 ? place(given, 1, token) : given->values + row * HEAD_DIM);
    float score = 0;
    FOR_SHARE score += query[i] * key[i];
    add(sub_group_reduce_add(score), value, top, sum, context);
  }
}

inline void add_sink(const Given* given, uint query_head, float* top, float* sum, float* context) {
  const __global REAL* sink = given->state + SINKS + 2 * query_head;
  float value[SHARE];
  FOR_SHARE value[i] = 0;
  add((float)sink[0] + (float)sink[1], value, top, sum, context);
}

inline void keep(const Given* given, int token) {
  const uint lane = get_sub_group_local_id();
  const int row = (token - given->past) * HEAD_DIM;
  FOR_SHARE place(given, 0, token)[SHARE * lane + i] = given->keys[row + SHARE * lane + i];
  FOR_SHARE place(given, 1, token)[SHARE * lane + i] = given->values[row + SHARE * lane + i];
}

__attribute__((intel_reqd_sub_group_size(LANES)))
__kernel void ovtq_window(__global REAL* state, const __global REAL* step, const __global int* facts,
                          __global OUTPUT0_TYPE* output) {
  const uint lane = get_sub_group_local_id(), me = get_sub_group_id(), task = get_group_id(0);
  const uint rows = INPUT2_DIMS[3] - WINDOW - 1, query_head = task / rows, head = query_head / GROUP;
  const int at = task % rows, past = facts[WINDOW + rows - 1], count = facts[WINDOW + rows];
  const __global REAL* keys = step + (size_t)(QUERY_HEADS + head) * count * HEAD_DIM;
  const Given given = {state, keys, keys + (size_t)KV_HEADS * count * HEAD_DIM, facts, head, past};
  const size_t mine = ((size_t)query_head * count + at) * HEAD_DIM;
  __local float joined[SUB_GROUPS][HEAD_DIM + 2];

  if (rows > 1 && at < WINDOW - 1) {
    if (at > 0 || query_head % GROUP > 0) return;
    const int many = min(count, WINDOW - 1);
    for (int n = me; n < many * GROUP; n += SUB_GROUPS) {
      const size_t query = ((size_t)(query_head + n % GROUP) * count + n / GROUP) * HEAD_DIM;
      float context[SHARE], top = NOWHERE, sum = 0;
      FOR_SHARE context[i] = 0;
      add_sink(&given, query_head + n % GROUP, &top, &sum, context);
      attend(&given, step + query, n / GROUP, 0, 1, &top, &sum, context);
      FOR_SHARE output[query + SHARE * lane + i] = (OUTPUT0_TYPE)(context[i] / sum);
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    for (int n = max(count - WINDOW, 0) + (int)me; n < count; n += SUB_GROUPS) keep(&given, past + n);
    return;
  }
  if (at >= count) return;  // padding

  float context[SHARE], top = NOWHERE, sum = 0;
  FOR_SHARE context[i] = 0;
  if (me == 0) add_sink(&given, query_head, &top, &sum, context);
  attend(&given, step + mine, at, me, SUB_GROUPS, &top, &sum, context);
  if (rows == 1 && query_head % GROUP == 0 && me == 0) keep(&given, past);  // nobody reads that place in this step
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
  FOR_SHARE output[mine + SHARE * lane + i] = (OUTPUT0_TYPE)(context[i] / total);
}
