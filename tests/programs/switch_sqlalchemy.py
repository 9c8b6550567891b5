"""SQLAlchemy's asyncio engine: it runs synchronous code in greenlets, which it leaves at each query."""
import asyncio
import os
import tempfile

import unharmed_target as t
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

print(sum(t.quick(i) for i in range(20)))


async def main(file):
    engine = create_async_engine("sqlite+aiosqlite:///" + file)

    def query(connection, n):
        total = 0
        for i in range(5):
            total += t.around(connection.execute, text("select :n + :i"), {"n": n, "i": i}).scalar()
        return total

    async def task(n):
        async with engine.connect() as connection:
            return await connection.run_sync(lambda connection: t.outer(query, connection, n))

    print(await asyncio.gather(*[task(n) for n in range(10)]))
    await engine.dispose()


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(os.path.join(folder, "test.db")))
