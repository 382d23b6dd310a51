"""The table of the networks in the README and in docs/models.md, from `cotnet_ext.models.VARIANTS`.

`python tests/networks_table.py` writes it; `test_models_table.py` checks that it is there.
"""

from __future__ import annotations

from pathlib import Path

from cotnet_ext.models import VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "models.md")
BEGIN, END = "<!-- networks:begin -->\n", "<!-- networks:end -->"
HEAD = """\
| Name | Network | Parameters | GMACs | Published top-1 / top-5 |
| :-- | :-- | --: | --: | --: |
"""
NOTES = """
GMACs: multiplications of convolutions, classifier and aggregations for images of the size that the
official configuration sets. Accuracies are those of the authors on ImageNet, not measured here.
(The official README gives SE-CoTNetD-152 17.0 at 224: about the cost at 256, its default.)
"""


def render() -> str:
    return HEAD + "".join(map(_row, VARIANTS.values())) + NOTES


def _row(variant: Variant) -> str:
    accuracy = "none"
    if variant.top1 is not None:
        accuracy = f"{variant.top1} / {variant.top5} at {variant.published_size}"
    cells = (
        f"`{variant.name}`",
        variant.title,
        f"{variant.params / 1e6:.1f} M",
        f"{variant.gmacs:.2f} at {variant.input_size[1]}",
        accuracy,
    )
    return f"| {' | '.join(cells)} |\n"


def parts(document: Path) -> tuple[str, str, str]:
    """What is before the table, the table, and what follows it."""
    before, begin, rest = document.read_text().partition(BEGIN)
    table, end, after = rest.partition(END)
    assert begin and end, f"{document.name} has no place for the table of the networks"
    return before + begin, table, end + after


if __name__ == "__main__":
    for document in DOCUMENTS:
        before, _, after = parts(document)
        document.write_text(before + render() + after)
