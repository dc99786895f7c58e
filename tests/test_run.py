import time, json
def test_x(program, customers, standin, servers):
    print({k:v.version for k,v in servers.items()})
    for i in range(3):
        db = customers(2)
        t=time.time(); e = program(database=db); print(time.time()-t)
    print(e.console, e.errors, e.log, json.dumps(e.results,indent=1))
    print(standin.state())
    for n in (21, 101):
        db = customers(n)
        t=time.time(); e = program(database=db); print(n, time.time()-t, e.console)
