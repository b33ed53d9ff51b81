"""The report of a study: text, figures and a page, all from the mapping in `statistical_results.json`.

Computes no statistic and reads no file of a study: what is not in the mapping is not in the report.
"""
