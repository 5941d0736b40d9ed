"""Whether both towers can be one graph of torch.compile."""

from ds_linclip.config.schema import Config

__all__ = ["graph_break"]

#: By default torch compiles a function eight times; a size needs two, with gradients and without.
_MOST_SIZES = 4


def graph_break(config: Config) -> str | None:
    """Return what keeps torch.compile from taking a tower as one graph; None: nothing.

    ZeRO-3 gathers the weights of every layer in a hook, and the library fla starts its kernels
    itself: the graph ends at each. Tensor-, context- and pipeline-parallel communication and
    recomputation are operations of the graph. Every image size is compiled for itself.
    """
    if config.zero.stage == 3:
        return "zero.stage is 3"
    towers = config.model.vision, config.model.text
    kinds = (each for tower in towers for each in tower.attentions)
    if any(getattr(each, "implementation", "torch") == "fla" for each in kinds):
        return "an attention has the implementation fla"
    sizes = {stage.image_size for stage in config.data.resolutions}
    if len(sizes) > _MOST_SIZES:
        return f"data.resolutions has {len(sizes)} image sizes (at most {_MOST_SIZES})"
    return None
