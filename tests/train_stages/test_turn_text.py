"""The text around turns: the short way equals rendering the template, and templates that do more are rendered."""

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regiontower.train_stages.turn_text import TurnText
from regiontower.vision_towers.errors import UserError

FIXED = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}[{{ m.role }}]{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if opening %}[assistant]{% endif %}"
)
STRIPS = FIXED.replace("{{ m.content }}", "{{ m.content | trim }}")
NUMBERS = FIXED.replace("[{{ m.role }}]", "[{{ m.role }}]{% if m.role == 'user' %}{{ loop.index }}{% endif %}")
REWRITES = "{% for m in messages %}{{ m.content if loop.last else 'old' }}{% endfor %}"


def render(template):
    compiled = jinja2.Template(template)
    return lambda messages, opening: compiled.render(messages=messages, opening=opening)


def brute_force(template, turns, with_image):
    """The text that each message adds, by rendering everything again after each."""
    write, messages, text, found = render(template), [], "", []
    for number, (question, answer) in enumerate(turns):
        image = "<image>" if with_image and number == 0 else ""
        messages.append({"role": "user", "content": image + question})
        asked = write(messages, True)
        messages.append({"role": "assistant", "content": answer})
        answered = write(messages, False)
        found.append((asked.removeprefix(text), answered.removeprefix(asked)))
        text = answered
    return found


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize("template", [FIXED, STRIPS, NUMBERS])
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.booleans())
def test_pieces_are_what_the_template_writes(template, turns, with_image):
    assert TurnText(render(template)).pieces(turns, with_image) == brute_force(template, turns, with_image)


@pytest.mark.parametrize(("template", "calls"), [(FIXED, 0), (STRIPS, 8), (NUMBERS, 8)])
def test_only_a_template_of_fixed_text_is_not_rendered_again(template, calls):
    count = 0

    def counted(messages, opening):
        nonlocal count
        count += 1
        return render(template)(messages, opening)

    text = TurnText(counted)
    count = 0
    text.pieces([("a", "b")] * 4, with_image=True)
    assert count == calls


def test_a_template_that_rewrites_earlier_turns_is_refused():
    text = TurnText(render(REWRITES))
    with pytest.raises(UserError, match="rewrites earlier turns"):
        text.pieces([("a", "b"), ("c", "d")], with_image=False)
