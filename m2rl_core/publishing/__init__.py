"""From stages to a report: notebooks run by papermill, pages and tables made from what they published."""
