"""ComfyUI-QSched: few-step diffusion on quantized weights, with learned sampling corrections."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; nothing of ComfyUI may be imported before it."""
    from .nodes import QSchedExtension

    return QSchedExtension()
