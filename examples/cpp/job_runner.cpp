// Runs the jobs of a directory. Start as many runners as you like; if they are on several machines that share the
// directory, name one store for all of them in NBLOCK_URL.
//
//     job_runner DIRECTORY
//
// Every file *.job is a shell script. The process that gets a job's lock runs it and renames it to *.done;
// the others take the next one. If a runner dies, another one can run its job when the lease has ended.
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <mutex>

#include <nblock.hpp>

namespace fs = std::filesystem;

static bool run(const fs::path &job)
{
    if (!fs::exists(job))
        return false; // another runner did it after we read the directory, and before we got the lock
    if (std::system(("sh '" + job.string() + "'").c_str()) != 0) {
        std::cerr << job << " failed: it will be tried again\n";
        return false;
    }
    fs::rename(job, fs::path(job).replace_extension(".done"));
    return true;
}

int main(int argc, char **argv)
try {
    if (argc != 2) {
        std::cerr << "usage: job_runner DIRECTORY\n";
        return 64;
    }
    const nblock::client client;
    int done = 0;
    for (const auto &entry : fs::directory_iterator(argv[1])) {
        if (entry.path().extension() != ".job")
            continue;
        // Renewed while the job runs, however long that is.
        nblock::lock lock(client, "jobs:" + entry.path().filename().string());
        if (const std::unique_lock mine(lock, std::try_to_lock); mine)
            done += run(entry.path());
        if (lock.lost())
            std::cerr << entry.path() << ": another runner may have run it at the same time\n";
    }
    std::cout << done << " jobs done\n";
} catch (const std::exception &error) {
    std::cerr << "job_runner: " << error.what() << '\n';
    return 1;
}
