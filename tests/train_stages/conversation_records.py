"""Records with all that conversations ask about, and what their turns answer."""

from regiontower.train_stages.conversation_kinds import BoxList, Turn
from regiontower.train_stages.records import PointLabel, Record, Region
from regiontower.train_stages.scenes import generate_scene


def desk() -> Record:
    """A record with everything: two stars that share a phrase, a sign, grass, points, absent phrases, bad markers."""
    return Record(
        image="desk.png",
        width=400,
        height=200,
        captions=["Two stars and a sign.", "broken <image> caption"],
        absent=["green star", "<region>"],
        points=[PointLabel(xy=(1.0, 30.0), texts=["leftmost star"]), PointLabel(xy=(350, 150), texts=[])],
        regions=[
            Region(
                box_xyxy=(0, 20, 60, 80),
                category="star",
                texts=["Star", "red star", "leftmost star"],
                captions=["a red star"],
                tags=["star", "red"],
            ),
            Region(
                box_xyxy=(100, 10, 140, 50),
                category="star",
                texts=["star", "blue star"],
                captions=["a blue star", "a star at the top"],
                tags=["star", "blue"],
            ),
            Region(
                box_xyxy=(200, 100, 300, 140),
                category="sign",
                texts=["sign", 'sign "apple"'],
                tags=["sign", "red"],
                ocr="apple",
            ),
            Region(box_xyxy=(0, 150, 400, 200), category="grass", stuff=True),
            Region(box_xyxy=(310, 10, 390, 40), ocr="buy <|end|> now"),
        ],
    )


def receipt(lines: int = 60) -> Record:
    """Text lines alone, as many as a long receipt has."""
    regions = [
        Region(box_xyxy=(10, 10 * i + 1, 200, 10 * i + 9), ocr=f"LINE {i}", texts=[f'the text "LINE {i}"'])
        for i in range(lines)
    ]
    return Record(image="receipt.png", width=210, height=10 * lines + 10, regions=regions)


def every_record() -> list[Record]:
    return [desk(), receipt(), *(generate_scene(seed).record for seed in range(6))]


def boxes_of(turn: Turn) -> BoxList:
    (answer,) = turn.answer
    assert isinstance(answer, BoxList)
    return answer
