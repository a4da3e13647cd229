"""The experts that a server tells of in its answers, if the layers run where no hook sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_kld.errors import CaptureError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pytest_kld.engines import Routing


def experts_told(told: NDArray[np.int32], routing: Routing, per_token: int | None, what: str) -> Tensor | None:
    """Return the experts [tokens, layers with experts, K] of a window.

    Args:
        told: [tokens, layers · K], of all layers of the model; see `Answer.experts`.
        routing: which layers have experts, and how many.
        per_token: K.
        what: the window, for messages.

    Returns:
        int32; None if a layer's ids are not different ones, as where the server left zeros since it did not see them.

    Raises:
        CaptureError: the ids do not fit the model.

    """
    width = told.shape[1]
    if not per_token or width % per_token or width // per_token <= max(routing.layers, default=-1):
        raise CaptureError(
            f"{what}: the server told {width} experts of each token, which does not fit {per_token} in each of its "
            f"layers (layer {max(routing.layers, default=None)} has some)"
        )
    ids = torch.from_numpy(told.copy()).reshape(len(told), -1, per_token)[:, list(routing.layers)]
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < routing.experts:
        raise CaptureError(
            f"{what}: the server told experts {int(ids.min())} to {int(ids.max())}, and the model has {routing.experts}"
        )
    in_order = ids.sort(-1).values
    return None if (in_order[..., 1:] == in_order[..., :-1]).any() else ids.contiguous()
