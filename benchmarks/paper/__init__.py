"""The study of arXiv 2512.01534 on a simulated cohort, claim by claim.

- `published`: detectors, test cohorts, Dice and lesion volumes of the publication;
- `cohort`: simulated participants, `scoring`: their score tables (command ``score``);
- `claims`: claims, verdicts and published figures;
- `study`: score tables as read from disk, `bootstrap`: intervals, `estimates`: the number of each claim;
- `tables`: ``benchmarks/results/paper`` (command ``evaluate``);
- `figures` and `page`: ``docs/benchmark.md`` (command ``page``).
"""
