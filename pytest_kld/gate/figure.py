"""A figure that explains itself in a failed comparison."""

from __future__ import annotations


class Figure(float):
    """A figure that knows its name, so that a failed `assert kld.mean < 0.05` explains itself."""

    __slots__ = ("label", "pair", "unit")
    label: str
    pair: str
    unit: str

    def __new__(cls, value: float, *, label: str, unit: str, pair: str) -> Figure:
        """Create a float that carries its label, its unit, and the pair that it belongs to."""
        figure = super().__new__(cls, value)
        figure.label, figure.unit, figure.pair = label, unit, pair
        return figure

    def explain(self, operator: str, other: float) -> list[str]:
        """Return the lines that pytest shows under a failed comparison."""
        unit = f" {self.unit}" if self.unit else ""
        return [
            f"{float(self):.6g} {operator} {float(other):.6g}",
            f"{self.label} of {self.pair} is {float(self):.6g}{unit}, "
            f"{abs(self - other):.6g} away from {float(other):.6g}",
        ]


_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def explain_comparison(operator: str, left: object, right: object) -> list[str] | None:
    """Explain a failed comparison between a figure and a number, in either order; None for any other comparison."""
    if isinstance(left, Figure) and isinstance(right, int | float):
        return left.explain(operator, right)
    if isinstance(right, Figure) and isinstance(left, int | float) and operator in _MIRRORED:
        return right.explain(_MIRRORED[operator], left)
    return None
