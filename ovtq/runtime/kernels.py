"""What a host has to set for a model whose full layers are attended to by kernels of ovtq."""

from __future__ import annotations

from pathlib import Path

from ovtq.codec.kernel_files import CONFIG, FOLDER
from ovtq.errors import telling


@telling
def properties(model_dir: Path | str) -> dict[str, str]:
    """The properties that a converted model is compiled with: CONFIG_FILE and no model cache, if it has kernels.

    Of any other there are none. What is loaded from a model cache ends the process on the emulated device, and
    optimum-intel sets CACHE_DIR unless it is given.

    For a GPU, by any host: LLMPipeline(DIR, "GPU", **properties(DIR)), OVModelForCausalLM.from_pretrained(DIR,
    device="GPU", ov_config=properties(DIR)), core.compile_model(xml, "GPU", properties(DIR)).
    """
    path = Path(model_dir) / FOLDER / CONFIG
    return {"CONFIG_FILE": str(path.resolve()), "CACHE_DIR": ""} if path.is_file() else {}
