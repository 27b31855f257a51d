"""What people see: pictures, tables and the model card, from plans made by hand."""

import ast
import re
from pathlib import Path

import pytest

from mcmoe_vllm.checkpoint.sizes import Sizes, size
from mcmoe_vllm.plan import Plan, same_group_size
from mcmoe_vllm.report import plots
from mcmoe_vllm.report.plots import (
    DIGIT_COLOURS,
    WIDTH_COLOURS,
    draw_widths,
    write_bits_heatmap,
    write_heatmap,
    write_sweep,
)
from mcmoe_vllm.report.tables import (
    describe_layer,
    describe_measurement,
    print_plan,
    print_result,
    size_lines,
)

ROOM = Path(plots.__file__).parent

BITS = ((0, 1, 2), (3, 4, 2))
W2_BITS = ((0, 3, 2), (4, 1, 2))


def plan_of(bits=BITS, w2_bits=W2_BITS, model="mistralai/Mixtral-8x7B", **options) -> Plan:
    return Plan(
        model=model, architecture="MixtralForCausalLM", layers=(1, 3), bits=bits, w2_bits=w2_bits,
        candidate_bits=(0, 1, 2, 3, 4), group_size=same_group_size(32), dense_bits=4,
        nominal_bits=2.0, options=options,
    )  # fmt: skip


SIZES = Sizes(
    original_bytes=6000, expert_bytes=600, other_bytes=400, expert_parameters=1920, parameters=3000
)


# Pictures


def rgb(colour: str) -> tuple[int, ...]:
    named = {"black": "#000000", "white": "#FFFFFF"}
    digits = named.get(colour, colour)
    return tuple(int(digits[i : i + 2], 16) for i in (1, 3, 5))


def contrast(one: str, other: str) -> float:
    """By WCAG 2.1."""

    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
            for c in (value / 255 for value in rgb(colour))
        ]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", WIDTH_COLOURS)
def test_digits_can_be_read(width):
    assert contrast(DIGIT_COLOURS[width], WIDTH_COLOURS[width]) >= 4.5


def panels(figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes if axes.images}


def cells(picture: Path, figure, axes) -> list[list[int]]:
    """The widths that a panel shows, by the colour of a pixel of each cell beside its digit."""
    from matplotlib.image import imread

    figure.canvas.draw()
    pixels = (imread(picture)[..., :3] * 255).round()
    widths = {rgb(colour): width for width, colour in WIDTH_COLOURS.items()}
    rows, columns = axes.images[0].get_array().shape
    found, beside = [], 0.25 if axes.texts else 0.0
    for row in range(rows):
        line = []
        for column in range(columns):
            x, y = axes.transData.transform((column - beside, row + beside))
            line.append(widths[tuple(map(int, pixels[pixels.shape[0] - 1 - int(y), int(x)]))])
        found.append(line)
    return found


def draw(plan, path):
    """The file, and a figure like the one that it shows."""
    write_heatmap(plan, path)
    measured = plan.options.get("significance")
    uses = measured and [layer["frequency"] for layer in measured]
    return draw_widths(plan.layers, plan.pairs(), Path(plan.model).name, uses)


def test_both_groups_are_shown(tmp_path):
    plan, path = plan_of(), tmp_path / "widths.png"
    figure = draw(plan, path)
    shown = panels(figure)
    assert list(shown) == ["gate and up", "down"]
    for axes, widths in zip(shown.values(), (BITS, W2_BITS), strict=True):
        assert cells(path, figure, axes) == [list(row) for row in widths]
        texts = {t.get_text(): t.get_color() for t in axes.texts}
        assert texts == {str(w): DIGIT_COLOURS[w] for row in widths for w in row}
        assert [t.get_text() for t in axes.get_yticklabels()] == ["1", "3"]


def test_one_panel_where_they_are_equal(tmp_path):
    plan, path = plan_of(w2_bits=()), tmp_path / "widths.png"
    figure = draw(plan, path)
    assert list(panels(figure)) == ["gate, up and down"]
    assert cells(path, figure, panels(figure)["gate, up and down"]) == [list(r) for r in BITS]


def test_a_picture_says_what_it_shows():
    plan = plan_of()
    figure = draw_widths(plan.layers, plan.pairs(), "Mix$tral_$", None)
    assert figure.get_suptitle() == (
        f"Mix$tral_$: width of each expert's matrices\n{plan.average_bits():.2f} bits on average"
    )
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == ["dropped (0 bits)", "1 bit", "2 bits", "3 bits", "4 bits"]
    beside = [[t.get_text() for t in a.texts] for a in figure.axes if a.get_xlabel() == "average"]
    assert beside == [["1.00", "3.00"], ["1.67", "2.33"]]
    lengths = [[bar.get_width() for bar in a.patches] for a in figure.axes if a.patches]
    assert lengths == [[1.0, 3.0], [pytest.approx(5 / 3), pytest.approx(7 / 3)]]


@pytest.mark.parametrize(("layers", "experts"), [(48, 128), (58, 256)])
def test_many_experts_are_a_mosaic_ordered_by_use(tmp_path, layers, experts):
    """Expert e is used (e * 5 mod E) / E often and wide in proportion: sorted, widths fall."""
    uses = [[(e * 5 % experts) / experts for e in range(experts)]] * layers
    widths = tuple(tuple(1 + int(4 * u) for u in row) for row in uses)
    plan = Plan(
        model="m", architecture="a", layers=tuple(range(layers)), bits=widths, w2_bits=(),
        candidate_bits=(1, 2, 3, 4), group_size=same_group_size(32), dense_bits=4, nominal_bits=2.5,
        options={"significance": [{"frequency": row} for row in uses]},
    )  # fmt: skip
    path = tmp_path / "widths.png"
    figure = draw(plan, path)
    (axes,) = panels(figure).values()
    shown = cells(path, figure, axes)
    assert shown == [sorted(row, reverse=True) for row in widths]
    assert axes.get_xlabel() == "experts, most used first" and not axes.texts
    without = draw_widths(plan.layers, plan.pairs(), "m")
    (axes,) = panels(without).values()
    assert axes.images[0].get_array().tolist() == [list(row) for row in widths]
    assert axes.get_xlabel() == "expert"


def test_few_experts_stay_in_order():
    """Digits have room for the experts' numbers below them."""
    plan = plan_of()
    figure = draw_widths(plan.layers, plan.pairs(), "m", [[0.1, 0.2, 0.3]] * 2)
    assert panels(figure)["down"].images[0].get_array().tolist() == [list(r) for r in W2_BITS]
    assert panels(figure)["down"].get_xlabel() == "expert"


def test_letters_are_legible_on_a_page():
    """800 pixels for 8 inches: a letter of 9 points has 12 pixels."""
    plan = plan_of()
    figure = draw_widths(plan.layers, plan.pairs(), "m")
    assert figure.get_size_inches()[0] == plots.INCHES
    for axes in figure.axes:
        labels = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, axes.xaxis.label]
        assert all(label.get_fontsize() * 800 / plots.INCHES / 72 >= 12 for label in labels)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bits_heatmap((0,), [[(1, 2)]], path, "m"),
        lambda path: write_sweep([(2.0, 0.1), (1.5, 0.2)], path),
    ],
    ids=["heatmap", "sweep"],
)
def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch, write):
    from matplotlib.figure import Figure

    path = tmp_path / "picture.png"
    write(path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG") and whole.endswith(b"IEND\xaeB`\x82")

    def fail(self, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


# Tables


def test_the_plan_counts_whole_matrices(capsys):
    print_plan(plan_of(), SIZES)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err
    rows = [re.findall(r"[\d.]+", line) for line in err.splitlines() if line.startswith("│")]
    assert rows == [
        ["1", "012", "032", "3", "2", "3", "1", "0", "1.222"],
        ["3", "342", "412", "0", "1", "3", "2", "3", "2.778"],
    ]
    assert {"gate", "up", "down", "bit", "bits", "average"} <= set(re.findall(r"\w+", err))


def test_the_plan_has_one_column_of_digits_where_widths_agree(capsys):
    print_plan(plan_of(w2_bits=()), SIZES)
    err = capsys.readouterr().err
    assert "gate" not in err and "experts 0..2" in err and err.count("012") == 1


def test_size_lines():
    lines = size_lines(plan_of(), SIZES)
    assert lines.splitlines() == [
        "bits per expert weight: 2.000 nominal, 2.500 true (scales and zeros counted); "
        "whole model 2.667",
        "size: 5.9 KiB -> 1000 B (6.00x smaller)",
        "group sizes: w13 32, w2 32, dense 32",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(1023, "1023 B"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_size(nbytes, text):
    assert size(nbytes) == text


def test_lines_on_layers():
    assert describe_measurement([300, 20], [0.9, 0.1], [1]) == (
        "used 0.100..0.900, least sampled expert 1: 20 tokens "
        "| WARNING 1 experts hardly reached: [1]"
    )
    assert "WARNING" not in describe_measurement([300, 400], [0.4, 0.6], [])
    experts = {"bits": [[1, 4], [2, 2]], "error": 0.25, "tokens": [300, 20], "starved": [1]}
    summary = {"layer": 0, "seconds": 1.5, "peak_rss_bytes": 2048, "experts": experts}
    assert describe_layer(summary) == (
        "matrices: 2 of 1 bit, 3 of 2 bits, 1 of 4 bits | error 0.2500 | least sampled expert 1: "
        "20 tokens | WARNING hardly reached: [1] | 1.5 s | peak 2.0 KiB"
    )
    assert describe_layer({**summary, "experts": None}) == "no experts | 1.5 s | peak 2.0 KiB"


@pytest.mark.parametrize("costs", [None, "expected KL 0.1"])
def test_the_last_lines(capsys, costs):
    experts = [{"rounding_kept": 1, "matrices": 6}, {"rounding_kept": 2, "matrices": 6}]
    result = {
        "layers": [{}, *({"experts": e} for e in experts)],
        "seconds": 3.2,
        "peak_rss_bytes": 2048,
    }
    print_result(result, Path("out"), costs)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-3] == ([costs] if costs else [])
    assert lines[-3].endswith("in 3 of 12 expert matrices")
    assert lines[-1].endswith("vllm serve out --quantization mcmoe")


# The room


def test_the_room_imports_nothing_above_it():
    allowed = re.compile(r"mcmoe_vllm\.(report\.|checkpoint\.sizes|plan|widths|errors|disk)")
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("mcmoe"):
                assert allowed.match(node.module), f"{file.name} imports {node.module}"
