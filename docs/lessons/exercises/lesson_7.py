"""Lesson 7, reading evidence: write the bodies.

    python -m pytest docs/lessons/exercises/test_lesson_7.py       # what is still open?
"""


def draw(one, other, figure, draws):
    """Differences of a figure in draws of questions and seeds, an array (draws,).

    one, other: counts of two methods, arrays (seeds, questions, K). figure: sums over questions (..., K) ->
    (...). Each draw takes as many questions as there are, with replacement, the same ones for both methods
    and for every seed; and apart from them as many seeds as there are, with replacement, the same ones for
    both. Its difference is the mean, over the seeds drawn, of one's figure less the other's.
    """
    raise NotImplementedError("exercise 7.1 is open")


def needed(one, other, points):
    """The fewest questions with which half an interval of a paired difference is at most so many points.

    one, other: arrays (questions,) of 0 and 1, what two models got right in a first small test; further
    questions are taken to be of its kind. Half an interval is 1.96 standard errors of the mean difference,
    the variance being that of the small test (`var` of NumPy). At least 1.
    """
    raise NotImplementedError("exercise 7.2 is open")


def holm(p_values, chance=0.05):
    """Which of many differences remain, a list of bools.

    p_values: for each how often, were there no effect, an accident would look as large. With a single p at
    most `chance` it would remain. Here even one accident among all m of them has to be as rare, which Holm's
    way achieves (1979): walk through them from the smallest p on. The first remains if p <= chance / m, the
    second if p <= chance / (m - 1), and so on. Where one fails, it and all that follow fall.
    """
    raise NotImplementedError("exercise 7.3 is open")
