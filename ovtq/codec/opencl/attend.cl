// One new token: append it, and attend to the sink, the window, the history. Work-groups of a KV head share the history
// (the first has the rest); each gives a partial context of every query head, its largest score and its sum of weights.
//   step    queries (QUERY_HEADS, HEAD_DIM), key and value (KV_HEADS, HEAD_DIM) each; the number of past tokens as high
//           and low; then, a bit for each token, this one's included, whether it is shown, 8 in a number
//   given   the layer's constants, as a state has them
//   state   the layer's; before the first token there is nothing in it, and the constants are written, too
//   output  PARTS records of RECORD floats for each query head
// Before several tokens it is called to read the past instead:
//   step    a single row of numbers, `counts` of read.cl first
//   given   its scratch
//   output  zero
// A history is read by XMX where `xmx.cl` finds it, else coordinates are unpacked 32 at a time, from as many words of each
// plane as it has bits a code.
#define WORDS(plane, width, block) ((const __global uint*)(plane) + (block) * (width))
#define CODE(words, width, n) (((words)[(n) / (32 / (width))] >> ((width) * ((n) % (32 / (width))))) & ((1u << (width)) - 1))

__attribute__((intel_reqd_sub_group_size(LANES)))
__kernel void ovtq_attend(const __global REAL* step, __global REAL* given, __global REAL* state,
                          __global OUTPUT0_TYPE* output) {
  if (INPUT0_DIMS[0] == 1) {
    if (get_global_id(0) < 4) output[get_global_id(0)] = (OUTPUT0_TYPE)0;
    read_past(state, step, given, INPUT1_DIMS[1] / (2 * KV_HEADS * HEAD_DIM));
    return;
  }
  const uint lane = get_sub_group_local_id(), me = get_sub_group_id();
  const uint head = get_group_id(0) / PARTS, part = get_group_id(0) % PARTS;
  const __global REAL* keys = step + QUERY_HEADS * HEAD_DIM;
  const __global REAL* values = keys + KV_HEADS * HEAD_DIM;
  const __global REAL* columns = values + KV_HEADS * HEAD_DIM;
  const __global REAL* shown = columns + 2;
  const int past = count_of(columns[0], columns[1]);
  if (past >= CAPACITY) return;  // nothing is written out of bounds
  if (past == 0) keep_constants(state, given);

  const uint team = me / SPLIT, from = me % SPLIT * HEADS;  // the query heads that this sub-group takes
  __local float turned[SPLIT * HEADS][HEAD_DIM];
  __local float joined[TEAMS][SPLIT * HEADS][HEAD_DIM + 2];
  __local float sinks[SPLIT * HEADS];
  for (uint g = me; g < SPLIT * HEADS; g += SUB_GROUPS) {
    const uint of = head * GROUP + min(g, (uint)GROUP - 1);  // the last is there twice where they don't come apart evenly
    float query[SHARE], along = 0;
    load(query, step + of * HEAD_DIM);
    FOR_SHARE along += query[i] * (float)centre(given, KEY_CENTRES, head)[SHARE * lane + i];
    along = sub_group_reduce_add(along);
    if (lane == 0) sinks[g] = (float)given[SINKS + 2 * of] + (float)given[SINKS + 2 * of + 1] - along;
    turn(query, matrix(given, QUERY_BASES, head));
    FOR_SHARE turned[g][SHARE * lane + i] = query[i];
  }
  barrier(CLK_LOCAL_MEM_FENCE);

  float top[HEADS], sum[HEADS], context[HEADS][SHARE];
  for (int g = 0; g < HEADS; g++) {
    top[g] = NOWHERE;
    sum[g] = 0;
    FOR_SHARE context[g][i] = 0;
  }
  const int older = max(past - WINDOW, 0);  // tokens that are read as packed
  if (part == 0) {
    float key[SHARE], value[SHARE];
    if (team == 0) {  // the sink: a token without a value, so less the centre
      FOR_SHARE value[i] = -(float)centre(given, VALUE_CENTRES, head)[SHARE * lane + i];
      turn(value, matrix(given, VALUE_BASES, head));
      for (int g = 0; g < HEADS; g++) add(sinks[from + g], value, &top[g], &sum[g], context[g]);
    }
    if (team == TEAMS - 1) {  // the new token
      load_key(key, keys + head * HEAD_DIM, given, head);
      load_value(value, values + head * HEAD_DIM, given, head);
      for (int g = 0; g < HEADS; g++) {
        float score = 0;
        FOR_SHARE score += key[i] * turned[from + g][SHARE * lane + i];
        score = sub_group_reduce_add(score);
        if (is_shown(shown, past)) add(score, value, &top[g], &sum[g], context[g]);
      }
      if (from == 0) store(state, head, past, key, value, true);
    }
    for (int token = older + (int)team; token < past; token += TEAMS) {
      if (!is_shown(shown, token)) continue;
      load_recent(key, value, state, head, token);
      for (int g = 0; g < HEADS; g++) {
        float score = 0;
        FOR_SHARE score += key[i] * turned[from + g][SHARE * lane + i];
        add(sub_group_reduce_add(score), value, &top[g], &sum[g], context[g]);
      }
    }
  } else {  // 16 tokens at a time: lanes are tokens for the scores, coordinates for the context
    const int begin = ((int)(part - 1) * TEAMS + (int)team) * LANES, stride = (PARTS - 1) * TEAMS * LANES;
#ifdef XMX
    attend_by_xmx(state, head, shown, begin, stride, older, turned + from, top, sum, context);
#else
    for (int first = begin; first < older; first += stride) {
      const int token = min(first + (int)lane, older - 1);
      const __global uchar* bytes = codes_of(state, head, token);
      float score[HEADS];
      for (int g = 0; g < HEADS; g++) score[g] = 0;
      for (int block = 0; block < HEAD_DIM / 32; block++) {
        uint high[KEY_FIRST], low[KEY_SECOND ? KEY_SECOND : 1];
        _Pragma("unroll") for (int w = 0; w < KEY_FIRST; w++) high[w] = WORDS(bytes, KEY_FIRST, block)[w];
#if KEY_SECOND
        _Pragma("unroll") for (int w = 0; w < KEY_SECOND; w++)
          low[w] = WORDS(bytes + HEAD_DIM / 8 * KEY_FIRST, KEY_SECOND, block)[w];
#endif
        _Pragma("unroll") for (int n = 0; n < 32; n++) {
          uint code = CODE(high, KEY_FIRST, n);
#if KEY_SECOND
          code = code << KEY_SECOND | CODE(low, KEY_SECOND, n);
#endif
          const float x = (float)code - KEY_MIDDLE;
          for (int g = 0; g < HEADS; g++) score[g] += x * turned[from + g][32 * block + n];
        }
      }
      const float2 scales = scales_of(state, head, token);  // of the key, of the value
      const bool seen = first + (int)lane < older && is_shown(shown, token);
      float weight[HEADS];
      for (int g = 0; g < HEADS; g++) {
        const float x = seen ? score[g] * scales.x : NOWHERE;
        const float larger = fmax(top[g], sub_group_reduce_max(x)), old = native_exp(top[g] - larger);
        const float e = seen ? native_exp(x - larger) : 0;
        sum[g] = sum[g] * old + sub_group_reduce_add(e);
        top[g] = larger;
        weight[g] = e * scales.y;
        FOR_SHARE context[g][i] *= old;
      }
      const int many = min(LANES, older - first);
      for (int n = 0; n < many; n++) {
        float value[SHARE];
        read_codes(codes_of(state, head, first + n) + HEAD_DIM / 8 * (KEY_FIRST + KEY_SECOND),
                   VALUE_FIRST, VALUE_SECOND, VALUE_MIDDLE, value);
        for (int g = 0; g < HEADS; g++) {
          const float w = sub_group_broadcast(weight[g], n);
          FOR_SHARE context[g][i] += w * value[i];
        }
      }
    }
#endif
  }
  for (int g = 0; g < HEADS; g++) {
    FOR_SHARE joined[team][from + g][SHARE * lane + i] = context[g][i];
    if (lane == 0) {
      joined[team][from + g][HEAD_DIM] = top[g];
      joined[team][from + g][HEAD_DIM + 1] = sum[g];
    }
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  for (uint g = me; g < GROUP; g += SUB_GROUPS) {
    float largest = NOWHERE, total = 0, x[SHARE];
    FOR_SHARE x[i] = 0;
    for (int n = 0; n < TEAMS; n++) largest = fmax(largest, joined[n][g][HEAD_DIM]);
    for (int n = 0; n < TEAMS; n++) {
      const float factor = native_exp(joined[n][g][HEAD_DIM] - largest);
      total += factor * joined[n][g][HEAD_DIM + 1];
      FOR_SHARE x[i] += factor * joined[n][g][SHARE * lane + i];
    }
    turn(x, matrix(given, VALUE_RETURNS, head));
    FOR_SHARE x[i] += total * (float)centre(given, VALUE_CENTRES, head)[SHARE * lane + i];
    __global float* record = (__global float*)output + ((head * GROUP + g) * PARTS + part) * RECORD;
    FOR_SHARE record[SHARE * lane + i] = x[i];
    if (lane == 0) {
      record[HEAD_DIM] = largest;
      record[HEAD_DIM + 1] = total;
    }
  }
}
