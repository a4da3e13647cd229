"""See the package."""


def rotary_embedding(*args: object, **kwargs: object) -> None:
    """Be there to be imported."""
    raise NotImplementedError("the stand-in for vllm is only there to be imported")
