"""What is measured of held-out regions while a tower is trained."""

from dataclasses import replace

from regiontower.eval.probe import neighbours_during


def test_neighbours_of_regions_and_nothing_where_there_is_no_label(rice_tower, squares):
    cache, measure = squares(10, 3), neighbours_during("category")
    # Eight images vote on two, all of one class: the box of the other square says its colour and is a text.
    alike = [
        record.model_copy(update={"regions": [region.model_copy(update={"tags": []}) for region in record.regions]})
        for record in cache.records
    ]
    assert measure(rice_tower, replace(cache, records=alike)) == {"knn_top1": 1.0}
    wrong = [
        record.model_copy(
            update={"regions": [region.model_copy(update={"category": "circle"}) for region in record.regions]}
        )
        if row % 5 == 4
        else record
        for row, record in enumerate(cache.records)
    ]
    assert measure(rice_tower, replace(cache, records=wrong)) == {"knn_top1": 0.0}
    few = replace(cache, records=cache.records[:4], frames=cache.frames[:4])
    assert measure(rice_tower, few) == {}  # none of them is asked about
    captions = [record.model_copy(update={"regions": []}) for record in cache.records]
    assert measure(rice_tower, replace(cache, records=captions)) == {}
    assert neighbours_during("cluster")(rice_tower, cache) == {}
