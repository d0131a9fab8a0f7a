// npm's redlock on one server, told by lines on standard input what to do: acquire KEY SECONDS, release KEY.

import { createInterface } from 'node:readline';
import { createRequire } from 'node:module';

// From the directory that is named: this file is not beside its packages.
const require = createRequire(process.argv[3] + '/');
const ioredis = require('ioredis');
const redlock = require('redlock');
const Redis = ioredis.default ?? ioredis.Redis ?? ioredis;
const Redlock = redlock.default ?? redlock;

const client = new Redis(Number(process.argv[2]));
const locker = new Redlock([client], { retryCount: 0, automaticExtensionThreshold: 0 });
const locks = new Map();
for await (const line of createInterface({ input: process.stdin })) {
  const [verb, key, seconds] = line.split(' ');
  let done = true;
  try {
    if (verb === 'acquire') locks.set(key, await locker.acquire([key], seconds * 1000));
    else await locks.get(key).release();
  } catch (error) {
    done = false;
  }
  console.log(`@ ${done ? 'yes' : 'no'}`);
}
process.exit(0);
