"""The dashboard: web pages over run folders, which it only reads; what an operator asks for goes into the commands.

::

    folders ──► course ──► panels ──► charts ──► the browser (ECharts), or pictures (matplotlib) in a report
                 │  what was recorded, read on as it grows
                 ├──► spending   ε so far, computed beside the run
                 └──► cautions   what an operator should know

Pages are HTML from templates; `app` sends their parts anew as they change. Needs the extra: pip install
'fedtopk[dashboard]'.
"""
