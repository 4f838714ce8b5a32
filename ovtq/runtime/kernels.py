"""What a host has to set for a model whose full layers are attended to by kernels of ovtq."""

from __future__ import annotations

from pathlib import Path

from ovtq.codec.kernel_files import CONFIG, FOLDER
from ovtq.errors import telling


@telling
def properties(model_dir: Path | str) -> dict[str, str]:
    """The properties that a converted model is compiled with: CONFIG_FILE, if it has kernels, and else none.

    For a GPU, by any host: LLMPipeline(DIR, "GPU", **properties(DIR)), OVModelForCausalLM.from_pretrained(DIR,
    device="GPU", ov_config=properties(DIR)), core.compile_model(xml, "GPU", properties(DIR)).
    """
    path = Path(model_dir) / FOLDER / CONFIG
    return {"CONFIG_FILE": str(path.resolve())} if path.is_file() else {}
