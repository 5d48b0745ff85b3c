"""A run's page as one HTML file that refers to nothing outside of itself, with its charts as PNG pictures beside it.

The pictures need the extra: pip install 'fedtopk[pictures]'.
"""

import base64
import io
from pathlib import Path

from common.errors import MissingDependency
from server.dashboard.course import explained, read_course
from server.dashboard.log import search
from server.dashboard.panels import Missing, panels
from server.dashboard.spending import Spending
from server.dashboard.view import SECTIONS, drawing, log_lines, run_facts, settings_part, static_file, templates
from server.durable import make_folder, replacing
from server.run_folder import RunFolder

_LINES = 400
"""Of the log, the newest."""


def write_report(run: Path, to: Path) -> dict[str, str]:
    """Write ``report.html`` and one PNG for each chart into the folder `to`; their paths by name.

    Raises :class:`RunError` where the run cannot be read or the folder not be written to.
    """
    try:
        from server.dashboard.pictures import picture
    except ImportError:
        raise MissingDependency("Expected matplotlib to draw charts (pip install 'fedtopk[pictures]').") from None
    with explained(run):
        course, spending = read_course(RunFolder(run)), Spending()
        spending.finish(course)
        make_folder(to)
        written, sections = {}, []
        for section, row in panels(course, spending).items():
            shown = []
            for panel in row:
                entry = drawing(panel, section)
                if not isinstance(panel, Missing):
                    content = io.BytesIO()
                    picture(panel).savefig(content, format="png", dpi=110, metadata={"Software": None})
                    with replacing(to / f"{panel.id}.png") as file:
                        file.write_bytes(content.getvalue())
                    written[panel.id] = str(to / f"{panel.id}.png")
                    entry["picture"] = base64.b64encode(content.getvalue()).decode()
                shown.append(entry)
            sections.append((section, SECTIONS[section], shown))
        facts = run_facts(run.resolve().name, course, spending) | {
            "preview": False,
            "sections": sections,
            "settings_part": settings_part(course.settings),
            "log": log_lines(search(course.folder, "", _LINES)),
        }
        page = templates.get_template("report.html").render(facts | {"style": static_file("style.css").decode()})
        with replacing(to / "report.html") as file:
            file.write_text(page, encoding="utf-8")
        return {"html": str(to / "report.html")} | written
