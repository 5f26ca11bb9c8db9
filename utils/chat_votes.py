"""Like and dislike with a comment, and which of three answers is best."""

from collections.abc import Mapping, Sequence

import gradio as gr

from utils.chat_limits import MAX_COMMENT, RequestLimit, clean
from utils.chat_talk import Answer, name, visitor
from utils.config import MODELS
from utils.feedback import Feedback, Vote

NONE_GOOD = "none"
VOTES = 120  # per visitor, in a window of `RequestLimit`


class Votes:
    """Turns what a visitor clicked into lines of `utils.feedback`."""

    def __init__(self, feedback: Feedback):
        self.feedback = feedback
        self.limit = RequestLimit(VOTES)

    def save(self, vote: Vote, request: gr.Request) -> None:
        """Write the vote down and say so, or say why not, on the page."""
        if refused := self.limit.take(visitor(request)):
            raise gr.Error(refused, print_exception=False)
        try:
            self.feedback.save(vote)
        except OSError as error:
            raise gr.Error(
                f"The vote was not saved: {error.strerror or error}.",
                print_exception=False,
            ) from error
        gr.Info("Thank you, your vote is saved.")


def add_votes(votes: Votes, chatbot: gr.Chatbot, answers: gr.State) -> None:
    """Under the conversation: a panel that opens on a thumb and takes a comment."""
    chosen = gr.State(None)
    with gr.Group(visible=False) as panel:
        what = gr.Textbox(label="Your vote", interactive=False)
        comment = gr.Textbox(
            label="Comment (optional)", max_length=MAX_COMMENT, lines=2
        )
        with gr.Row():
            save = gr.Button("Save this vote", variant="primary")
            drop = gr.Button("Do not save")

    def choose(history: list[dict], known: dict[str, Answer], like: gr.LikeData):
        answer = _answer_at(history, known, like.index)
        if answer is None or not isinstance(like.liked, bool):
            gr.Warning("That answer cannot be voted on any more. Please ask again.")
            return None, gr.update(visible=False), "", ""
        verb = "like" if like.liked else "dislike"
        said = f"You {verb} the answer of {name(answer.model)}"
        return (answer.id, like.liked), gr.update(visible=True), said, ""

    def keep(vote, text: str | None, known: dict[str, Answer], request: gr.Request):
        answer = known.get(vote[0]) if vote else None
        if answer is None:
            gr.Warning("Choose 👍 or 👎 under an answer first.")
        else:
            line = vote_on(answer, liked=vote[1], comment=text)
            votes.save(line, request)
        return None, gr.update(visible=False)

    chatbot.like(
        choose,
        [chatbot, answers],
        [chosen, panel, what, comment],
        api_visibility="private",
    )
    save.click(keep, [chosen, comment, answers], [chosen, panel], api_name="vote")
    comment.submit(
        keep, [chosen, comment, answers], [chosen, panel], api_visibility="private"
    )
    drop.click(
        lambda: (None, gr.update(visible=False)),
        None,
        [chosen, panel],
        api_visibility="private",
    )


def add_best(votes: Votes, compared: gr.State) -> gr.Radio:
    """Under three answers: which is best, with a comment."""
    choices = [(name(key), key) for key in MODELS]
    best = gr.Radio(
        [*choices, ("None of them is good", NONE_GOOD)], label="Which answer is best?"
    )
    comment = gr.Textbox(
        label="Why? (optional)", max_length=MAX_COMMENT, lines=1, max_lines=4
    )
    save = gr.Button("Save this choice")

    def keep(
        key: str | None,
        text: str | None,
        three: dict[str, Answer],
        request: gr.Request,
    ):
        answer = three.get(key)
        if not three or key is None or (key != NONE_GOOD and answer is None):
            gr.Warning("Compare three answers and choose one first.")
            return key, text
        votes.save(vote_on_three(three, key, text), request)
        return None, ""

    save.click(keep, [best, comment, compared], [best, comment], api_name="best")
    return best


def vote_on(
    answer: Answer, *, liked: bool, comment: str | None, kind: str = "answer"
) -> Vote:
    """The vote on one answer, with what made that answer."""
    return Vote(
        model=answer.model,
        liked=liked,
        comment=clean(comment or "")[:MAX_COMMENT],
        question=answer.question,
        answer=answer.text,
        settings=answer.settings,
        kind=kind,
    )


def vote_on_three(three: Mapping[str, Answer], key: str, comment: str | None) -> Vote:
    """The vote in a comparison; with no good answer it names no model."""
    if key in three:
        return vote_on(three[key], liked=True, comment=comment, kind="best_of_three")
    any_of_them = next(iter(three.values()))
    return Vote(
        model="",
        liked=False,
        comment=clean(comment or "")[:MAX_COMMENT],
        question=any_of_them.question,
        answer="",
        settings=any_of_them.settings,
        kind="best_of_three",
    )


def _answer_at(
    history: Sequence[Mapping], answers: Mapping[str, Answer], index
) -> Answer | None:
    """The answer at a place in the conversation, as Gradio counts places."""
    place = index[0] if isinstance(index, list | tuple) else index
    if not isinstance(place, int) or not 0 <= place < len(history):
        return None
    return answers.get((history[place].get("metadata") or {}).get("id"))
