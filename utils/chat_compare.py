"""The tab with three columns: one question, three answers, the reference below."""

from collections.abc import Iterator, Sequence
from threading import Lock

import gradio as gr

from utils.chat_limits import MAX_CHARACTERS
from utils.chat_look import column_head, figures_html
from utils.chat_talk import Answer, Controls, Talk, name
from utils.chat_votes import Votes, add_best
from utils.config import MODELS, SAMPLES, Settings, is_local
from utils.metrics import rouge_rows
from utils.sources import load_source, normalise

NO_REFERENCE = "No reference: this question is not one of our data set."
_scoring = Lock()  # `evaluate` writes into one cache folder


def references(settings: Settings) -> dict[str, str]:
    """The reference answers that are known here, by normalised question.

    Those of the run's first-aid data where it is a local file, rephrasings included,
    and of the samples that the project ships.
    """
    places = [str(SAMPLES / "first_aid.jsonl")]
    if is_local(settings.first_aid_dataset):
        places.append(settings.first_aid_dataset)
    known = {}
    for place in places:
        for row in load_source(place).rows:
            if "question" not in row:
                continue  # a conversation has no single reference
            for question in (row["question"], *row.get("rephrasings", ())):
                known[normalise(question)] = row["answer"]
    return known


def grow(
    talk: Talk,
    question: str,
    controls: Controls,
    source: str | None,
    token: str | None,
) -> Iterator[Answer]:
    """Yield the answers of all three models as they grow.

    One after the other where one model is in memory; side by side where the back end
    answers several at once.
    """
    growing = {
        key: talk.answer(key, question, [], controls, source, token) for key in MODELS
    }
    try:
        if talk.backend(source).at_once < len(growing):
            for stream in growing.values():
                yield from stream
            return
        while growing:
            for key in list(growing):
                answer = next(growing[key], None)
                if answer is None:
                    del growing[key]
                else:
                    yield answer
    finally:
        for stream in growing.values():
            stream.close()


def add_compare(
    talk: Talk,
    votes: Votes,
    settings_of_answers: Sequence,
    examples: Sequence[str],
    at_once: int,
) -> None:
    """Build the tab.

    Args:
        talk: what answers.
        votes: what keeps the choice.
        settings_of_answers: the controls that both tabs share.
        examples: questions to click on.
        at_once: how many visitors are answered at a time; the others queue.
    """
    known = references(talk.settings)
    compared = gr.State({})
    question = gr.Textbox(
        label="One question to all three",
        placeholder="Ask about first aid …",
        max_length=MAX_CHARACTERS,
        lines=2,
    )
    with gr.Row():
        run = gr.Button("Ask all three", variant="primary")
        stop = gr.Button("Stop", variant="stop")
    gr.Examples([[text] for text in examples], [question], label="Questions to try")
    boxes: dict[str, tuple[gr.Textbox, gr.HTML]] = {}
    with gr.Row():
        for key in MODELS:
            with gr.Column(min_width=280):
                gr.HTML(column_head(key))
                text = gr.Textbox(
                    label=f"Answer of {name(key)}",
                    interactive=False,
                    lines=6,
                    max_lines=40,
                )
                boxes[key] = (text, gr.HTML(elem_classes="figures"))
    reference = gr.Textbox(
        label="Reference answer", interactive=False, lines=2, max_lines=20
    )
    add_best(votes, compared)
    texts, figures = zip(*boxes.values())

    def compare(
        asked: str,
        request: gr.Request,
        token: gr.OAuthToken | None,
        source: str | None,
        *controls,
    ) -> Iterator[tuple]:
        if refused := talk.refuse(asked, list(MODELS), request):
            raise gr.Error(refused, print_exception=False)
        expected = known.get(normalise(asked), "")
        done: dict[str, Answer] = {}
        shown = dict.fromkeys(MODELS, "")
        lines = dict.fromkeys(MODELS, "")

        def page(ended: bool = False) -> tuple:
            said = expected or NO_REFERENCE
            return (*shown.values(), *lines.values(), said, done if ended else {})

        yield page()
        chosen = Controls.read(talk.settings, *controls)
        for answer in grow(talk, asked, chosen, source, token and token.token):
            done[answer.model] = answer
            shown[answer.model] = answer.text
            lines[answer.model] = figures_html(answer)
            yield page()
        if expected:
            whole = [key for key in MODELS if not done[key].problem]
            scores = rouge_l([done[key].text for key in whole], expected)
            for key, score in zip(whole, scores):
                more = f"ROUGE-L against the reference: {score:.3f}"
                lines[key] = figures_html(done[key], more)
        yield page(ended=True)

    asking = gr.on(
        [run.click, question.submit],
        compare,
        [question, *settings_of_answers],
        [*texts, *figures, reference, compared],
        api_name="compare",
        concurrency_limit=at_once,
    )
    stop.click(None, None, None, cancels=[asking], api_visibility="private")


def rouge_l(texts: Sequence[str], reference: str) -> list[float]:
    """The stemmed ROUGE-L F1 of each text."""
    if not texts:
        return []
    with _scoring:
        return rouge_rows(list(texts), [reference] * len(texts))["rougeL_f1"]
