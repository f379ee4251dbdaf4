"""Lesson 1, the language of a reply: write the bodies.

    python -m pytest docs/lessons/exercises/test_lesson_1.py       # what is still open?
"""


def probability(letter, contexts, counts, new):
    """How likely the letter is after contexts that grow longer: Witten and Bell.

    contexts: strings, the shortest first. counts: {context: Counter of the letters seen after it}. Begin with
    `new`. Each context that was seen n times, with k different letters after it, corrects the answer so far:

        p  <-  (times the letter came after it + k * p) / (n + k)

    A context that was never seen corrects nothing.
    """
    raise NotImplementedError("exercise 1.1 is open")


def languages_of_words(evidence, change):
    """The language of each word, a list: the path that scores most.

    evidence: for each word {language: nats that speak for it}. A path's score is the sum of the evidence for
    its languages, less `change` nats for each place where the language changes. At least one word.
    """
    raise NotImplementedError("exercise 1.2 is open")


def table(replies, answers, asked, language_of):
    """{(right language, right content): how many replies}, two bools; pairs that do not come may be missing.

    answers: for each reply {language: the expected answer}. asked: the language of each question.
    language_of: a function, reply -> language. The content is right if the reply equals the expected answer
    in any language but for case, spaces and full stops (. and 。) at its end.
    """
    raise NotImplementedError("exercise 1.3 is open")
