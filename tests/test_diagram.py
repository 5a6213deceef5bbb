"Block diagrams: what is drawn, where, and whether it fits"
import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import FancyBboxPatch

from seismodel.diagram import BOX_COLORS, Arrow, Box, draw_diagram

BOXES = {'trace': Box(0, .5, 'trace\n(B, 4096, 3)', 'data'),
         'frames': Box(1, .5, 'Conv1d\n(B, 1024, 256)'),
         'up': Box(2, 0, 'features'), 'down': Box(2, 1, 'x_normalized\n(B, 1024, 256)', 'target'),
         'loss': Box(5, 1, 'InfoNCE', 'loss')}


@pytest.fixture
def axes():
    fig = draw_diagram(BOXES,
                       [Arrow('trace', 'frames', 'strided'), Arrow('up', 'down', dashed=True)])
    fig.canvas.draw()
    yield fig.axes[0]
    plt.close(fig)


def boxes_of(axes): return [p for p in axes.patches if isinstance(p, FancyBboxPatch)]


def test_each_text_fits_its_box_and_each_box_the_figure(axes):
    assert len(boxes_of(axes)) == len(BOXES)
    width, height = axes.figure.canvas.get_width_height()
    assert (width, height) == (803, 176)
    for box, text in zip(boxes_of(axes),
                         (t for t in axes.texts
                          if t.get_text() in [b.text for b in BOXES.values()])):
        outer, inner = box.get_window_extent(), text.get_window_extent()
        assert outer.x0 < inner.x0 and inner.x1 < outer.x1, text.get_text()
        assert outer.y0 < inner.y0 and inner.y1 < outer.y1, text.get_text()
        assert 0 < outer.x0 and outer.x1 < width and 0 < outer.y0 and outer.y1 < height


def test_rows_count_downwards_and_kinds_have_colours(axes):
    trace, _, up, down, loss = boxes_of(axes)
    assert up.get_window_extent().y0 > down.get_window_extent().y1
    assert [plt.matplotlib.colors.to_hex(b.get_facecolor()) for b in (trace, up, down, loss)] == \
           [BOX_COLORS[k] for k in ('data', 'layer', 'target', 'loss')]


def test_arrows_run_from_edge_to_edge(axes):
    there, down = [t for t in axes.texts if getattr(t, 'arrow_patch', None) and not t.get_text()]
    assert there.xyann == pytest.approx((.39, .5)) and there.xy == pytest.approx((.61, .5))
    assert down.xyann == pytest.approx((2, .31)) and down.xy == pytest.approx((2, .69))
    assert (there.arrow_patch.get_linestyle(), down.arrow_patch.get_linestyle()) == ('-', '--')
    assert [t.get_position() for t in axes.texts if t.get_text() == 'strided'] == [(0, 3)]


def test_an_unknown_box_is_named():
    with pytest.raises(ValueError, match="names the box 'head'; there are trace, frames"):
        draw_diagram(BOXES, [Arrow('trace', 'head')])
