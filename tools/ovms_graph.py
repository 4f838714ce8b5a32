#!/usr/bin/env python3
"""Print a graph.pbtxt for OpenVINO Model Server: one servable of a converted folder, in the stateful pipeline.

usage: python tools/ovms_graph.py MODEL_DIR [--device GPU] > MODEL_DIR/graph.pbtxt

The server's default pipeline batches continuously, by paged attention, which takes the preset `rotate` alone;
`pipeline_type: LM` is LLMPipeline, and plugin_config is what it is made with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ovtq.errors import OvtqError
from ovtq.ir import io

GRAPH = """input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {{
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {{
    tag_index: "LOOPBACK:0",
    back_edge: true
  }}
  node_options: {{
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {{
{options}
    }}
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler",
    options {{
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{
        sync_set {{
          tag_index: "LOOPBACK:0"
        }}
      }}
    }}
  }}
}}
"""


def options_of(model_dir: Path, device: str) -> dict[str, str]:
    """The options of the calculator, as they are written. Raises InputError if the folder holds no model."""
    io.model_xml(model_dir)
    paged = io.record_of(model_dir).get("paged_attention", not io.stamp_of(io.load(model_dir)))
    found = {"models_path": '"./"', "device": json.dumps(device)}
    if paged:
        return found | {"pipeline_type": "LM_CB"}
    config = json.dumps({"ATTENTION_BACKEND": "SDPA"})
    return found | {"pipeline_type": "LM", "plugin_config": f"'{config}'"}


def main() -> int:
    """Print the graph; 2 after one line for what is wrong."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model_dir", type=Path)
    p.add_argument("--device", default="GPU")
    options = p.parse_args()
    try:
        found = options_of(options.model_dir, options.device)
    except OvtqError as error:
        print(f"ovms_graph: {error}", file=sys.stderr)
        return 2
    lines = ",\n".join(f"      {key}: {value}" for key, value in found.items())
    print(GRAPH.format(options=lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
