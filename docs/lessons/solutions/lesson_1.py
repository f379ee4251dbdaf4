"""Lesson 1, solved."""

from collections import Counter


def probability(letter, contexts, counts, new):
    """k, the number of different letters, is how often the context surprised: so much is kept for new ones."""
    p = new
    for context in contexts:
        if context in counts:
            after = counts[context]
            n, k = after.total(), len(after)
            p = (after[letter] + k * p) / (n + k)
    return p


def languages_of_words(evidence, change):
    """Viterbi: the best score of a path that ends here in each language, and where that path came from."""
    best, origins = evidence[0], []
    for word in evidence[1:]:
        top = max(best, key=best.get)
        stays = {language: best[language] >= best[top] - change for language in word}
        origins.append({language: language if stays[language] else top for language in word})
        best = {language: max(best[language], best[top] - change) + nats for language, nats in word.items()}
    path = [max(best, key=best.get)]
    for origin in reversed(origins):
        path.append(origin[path[-1]])
    return path[::-1]


def plain(text):
    """The text without what is forgiven."""
    return " ".join(text.lower().split()).rstrip(".。 ")


def table(replies, answers, asked, language_of):
    """The content is compared with every language's answer: a right answer in the wrong language is one."""
    counts = Counter()
    for reply, expected, language in zip(replies, answers, asked):
        knows = plain(reply) in [plain(answer) for answer in expected.values()]
        counts[language_of(reply) == language, knows] += 1
    return dict(counts)
