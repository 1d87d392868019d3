"""Four rows for every built-in task of the suites, what is answered to them, and the figures that it gets."""

from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

# name -> folders and file of the hub's repository, and the columns beside `image`, four rows each
HUB = {
    "docvqa": (
        "DocVQA/validation-00000-of-00001.parquet",
        {
            "questionId": ["1", "2", "3", "4"],
            "question": [f"What is on page {n}?" for n in range(4)],
            "question_types": [["handwritten"]] * 4,
            "docId": [7, 7, 8, 9],
            "ucsf_document_id": ["a"] * 4,
            "ucsf_document_page_no": ["1"] * 4,
            "answers": [["alpha"], ["beta", "betas"], ["gamma"], ["delta"]],
            "data_split": ["val"] * 4,
        },
        ["alpha", "betas", "gammb", "nothing"],
    ),
    "infovqa": (
        "InfographicVQA/validation-00000-of-00001.parquet",
        {
            "questionId": ["1", "2", "3", "4"],
            "question": [f"What is in figure {n}?" for n in range(4)],
            "answers": [["12"], ["34"], ["56%"], ["seven"]],
            "answer_type": [["single span"]] * 4,
            "image_url": ["u"] * 4,
            "operation/reasoning": [["none"]] * 4,
            "ocr": ["{}"] * 4,
            "data_split": ["val"] * 4,
        },
        ["12", "34", "56%", "no"],
    ),
    "textvqa": (
        "data/validation-00000-of-00001.parquet",
        {
            "image_id": list("abcd"),
            "question_id": [1, 2, 3, 4],
            "question": [f"which brand is number {n}?" for n in range(4)],
            "question_tokens": [["which"]] * 4,
            "image_width": [40] * 4,
            "image_height": [30] * 4,
            "flickr_original_url": ["u"] * 4,
            "flickr_300k_url": ["u"] * 4,
            "answers": [["nokia"] * 10, ["sony"] * 10, ["dell"] * 10, ["asus"] * 10],
            "image_classes": [["Phone"]] * 4,
            "set_name": ["val"] * 4,
            "ocr_tokens": [["NOKIA"]] * 4,
        },
        ["Nokia", "sony.", "hp", "hp"],
    ),
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        {
            "type": ["human_test", "human_test", "augmented_test", "augmented_test"],
            "question": [f"How much is bar {n}?" for n in range(4)],
            "answer": ["100", "Yes", "14.2", "France"],
        },
        ["104", "no", "14", "france"],
    ),
    "ocrbench": (
        "data/test-00000-of-00001.parquet",
        {
            "dataset": ["IIIT5K", "SVT", "HME100k", "docVQA"],
            "question": [f"what is written in the image {n}?" for n in range(4)],
            "question_type": [
                "Regular Text Recognition",
                "Regular Text Recognition",
                "Handwritten Mathematical Expression Recognition",
                "Doc-oriented VQA",
            ],
            "answer": [["PRIVATE"], ["bar"], ["x = 1"], ["12", "twelve"]],
        },
        ["it says private", "foo", "x=1", "twelve"],
    ),
    "ai2d": (
        "data/test-00000-of-00001.parquet",
        {
            "question": [f"What does letter {n} stand for?" for n in range(4)],
            "options": [["stem", "leaf", "root", "seed"]] * 4,
            "answer": ["0", "1", "2", "3"],
        },
        ["A", "B. leaf", "D", "D"],
    ),
    "mme": (
        "data/test-00000-of-00002-a1b2c3.parquet",
        {
            "question_id": ["existence/1.png", "existence/1.png", "OCR/2.png", "OCR/2.png"],
            "question": [f"Is there a {thing}? Please answer yes or no." for thing in ("cat", "dog", "sign", "logo")],
            "answer": ["Yes", "No", "Yes", "No"],
            "category": ["existence", "existence", "OCR", "OCR"],
        },
        ["Yes", "No", "Yes", "Yes"],
    ),
    "pope": (
        "data/test-00000-of-00003.parquet",
        {
            "id": list("0123"),
            "question_id": list("1234"),
            "question": [f"Is there a {thing} in the image?" for thing in ("car", "cup", "pen", "hat")],
            "answer": ["yes", "no", "yes", "no"],
            "image_source": ["COCO_val2014_1"] * 4,
            "category": ["adversarial"] * 4,
        },
        ["yes", "yes", "yes", "no"],
    ),
    "mmbench": (
        "en/dev-00000-of-00001.parquet",
        {
            "index": [1, 2, 3, 4],
            "question": [f"Which one is it, number {n}?" for n in range(4)],
            "hint": ["nan", "Look twice.", "nan", "nan"],
            "answer": ["A", "B", "A", "B"],
            **{letter: [f"{letter} {n}" for n in range(4)] for letter in "AB"},
            **{letter: ["nan"] * 4 for letter in "CD"},
            "category": ["color"] * 4,
            "source": ["s"] * 4,
            "L2-category": ["perception"] * 4,
            "comment": ["nan"] * 4,
            "split": ["dev"] * 4,
        },
        ["A", "The answer is B.", "B", "B"],
    ),
    "realworldqa": (
        "data/test-00000-of-00002.parquet",
        {
            "image_path": ["x.png"] * 4,
            "question": [f"Which way is {n}? A. Left B. Right Please answer directly." for n in range(4)],
            "answer": ["A", "B", "2", "Downhill"],
        },
        ["A", "A", "2", "downhill."],
    ),
    "mmstar": (
        "mmstar.parquet",
        {
            "index": [0, 1, 2, 3],
            "question": [f"Which scene is {n}? Options: A: sea, B: town, C: wood, D: desert" for n in range(4)],
            "answer": ["A", "B", "C", "D"],
            "category": ["coarse perception", "coarse perception", "math", "math"],
            "l2_category": ["image emotion", "image scene and topic", "geometry", "geometry"],
            "meta_info": ["{}"] * 4,
        },
        ["A", "C", "C", "D"],
    ),
}
# what the answers above are worth, counted by hand from each benchmark's rule
FIGURES = {
    "docvqa": {"anls": (1 + 1 + 0.8 + 0) / 4},
    "infovqa": {"anls": 3 / 4},
    "textvqa": {"exact_match": 2 / 4},
    "chartqa": {"relaxed_overall": 3 / 4, "relaxed_human_split": 1 / 2, "relaxed_augmented_split": 1.0},
    "ocrbench": {"ocrbench_accuracy": 3 / 4},
    "ai2d": {"exact_match": 3 / 4},
    "mme": {"mme_perception_score": 200.0 + 50.0, "mme_cognition_score": None},
    "pope": {
        "pope_accuracy": 3 / 4,
        "pope_precision": 2 / 3,
        "pope_recall": 1.0,
        "pope_f1_score": 0.8,
        "pope_yes_ratio": 1 / 2,
    },
    "mmbench": {"gpt_eval_score": 75.0},
    "realworldqa": {"exact_match": 3 / 4},
    "mmstar": {
        "coarse perception": 1 / 2,
        "fine-grained perception": None,
        "instance reasoning": None,
        "logical reasoning": None,
        "science & technology": None,
        "math": 1.0,
        "average": 2 / 3,  # of three kinds of question: 1, 0 and 1
    },
}


def column(values):
    if isinstance(values[0], list):
        return List(Value("string"))
    return Value("int64" if isinstance(values[0], int) else "string")


def write_hub(root: Path, noise_image) -> Path:
    """`HUB` as the hub's files lie in a data root."""
    for name, (file, columns, _) in HUB.items():
        path = root / name / file
        path.parent.mkdir(parents=True)
        features = Features({key: column(values) for key, values in columns.items()} | {"image": Image()})
        # MME asks twice about a picture, DocVQA now and then.
        seeds = [0, 0, 1, 1] if name in ("mme", "docvqa") else range(4)
        rows = {**columns, "image": [noise_image(40, 30, seed) for seed in seeds]}
        Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return root
