/* pyxis's options and what they do, for tests: the task runs in a root file system of its own, in a mount namespace
 * of its own, and sees of the node what is mounted. An image is a tar file. In plugstack.conf:
 *   required FILE.so data=DIR userland=DIR,DIR      data: where containers lie; userland: mounted in each, read-only
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis, 1)

enum { IMAGE, MOUNTS, WORKDIR, NAME, ENV, HOME, WRITABLE, ENTRYPOINT, OPTIONS };
static char *given[OPTIONS]; /* text; "1" or "0" for flags; NULL where the option was not given */
static char *data = "/tmp/enroot", *userland = "/usr";
static char root[4096];
static bool kept;

static int take(int val, const char *text, int remote)
{
	given[val / 2] = strdup(val / 2 < HOME ? text : val % 2 ? "1" : "0");
	return 0;
}

static struct spank_option options[] = {
	{"container-image", "IMAGE", "[pyxis] a path", 1, IMAGE * 2, take},
	{"container-mounts", "SRC:DST[:FLAGS],...", "[pyxis] bind mounts", 1, MOUNTS * 2, take},
	{"container-workdir", "PATH", "[pyxis] working directory inside", 1, WORKDIR * 2, take},
	{"container-name", "NAME[:no_exec]", "[pyxis] keep it, and use it again", 1, NAME * 2, take},
	{"container-env", "NAME,...", "[pyxis] variables in which the host wins", 1, ENV * 2, take},
	{"container-mount-home", NULL, "[pyxis] mount the home directory", 0, HOME * 2 + 1, take},
	{"no-container-mount-home", NULL, "[pyxis] do not", 0, HOME * 2, take},
	{"container-writable", NULL, "[pyxis] the root can be written to", 0, WRITABLE * 2 + 1, take},
	{"container-readonly", NULL, "[pyxis] it cannot", 0, WRITABLE * 2, take},
	{"container-entrypoint", NULL, "[pyxis] run the image's entrypoint", 0, ENTRYPOINT * 2 + 1, take},
	{"no-container-entrypoint", NULL, "[pyxis] do not", 0, ENTRYPOINT * 2, take},
	SPANK_OPTIONS_TABLE_END};

static int fail(const char *what, const char *which)
{
	slurm_error("pyxis: %s %s: %s", what, which, strerror(errno));
	return -1;
}

static bool flag(int option) { return given[option] && *given[option] == '1'; }

static int run(char *const command[])
{
	int status;
	pid_t pid = fork();
	if (pid == 0) {
		execvp(command[0], command);
		_exit(127);
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0 ? 0 : -1;
}

static void make(const char *path, bool directory) /* with all folders above it */
{
	char copy[8192];
	snprintf(copy, sizeof copy, "%s", path);
	for (char *slash = copy + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
		*slash = 0;
		mkdir(copy, 0755);
	}
	if (directory)
		mkdir(path, 0755);
	else
		close(creat(path, 0644));
}

static int bind_into(const char *source, const char *target, bool read_only)
{
	struct stat found;
	char inside[8192];
	if (stat(source, &found))
		return fail("mount source", source);
	snprintf(inside, sizeof inside, "%s%s", root, target);
	if (access(inside, F_OK))
		make(inside, S_ISDIR(found.st_mode));
	if (mount(source, inside, NULL, MS_BIND | MS_REC, NULL))
		return fail("cannot mount", target);
	if (read_only && mount(NULL, inside, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return fail("cannot mount read-only", target);
	return 0;
}

static int all_mounts(spank_t job)
{
	static const char *system_mounts[] = {"/proc", "/sys", "/dev", "/etc/hosts", "/etc/resolv.conf"};
	char tmp[8192], home[4096], *entry, *list;
	for (size_t i = 0; i < sizeof system_mounts / sizeof *system_mounts; i++)
		if (bind_into(system_mounts[i], system_mounts[i], false))
			return -1;
	for (list = strdup(userland); (entry = strsep(&list, ","));)
		if (bind_into(entry, entry, true))
			return -1;
	snprintf(tmp, sizeof tmp, "%s/tmp", root);
	if (mount("tmpfs", tmp, "tmpfs", 0, NULL)) /* enroot's default */
		return fail("cannot mount", "/tmp");
	for (list = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL; (entry = strsep(&list, ","));) {
		char *source = strsep(&entry, ":"), *target = strsep(&entry, ":");
		if (bind_into(source, target ? target : source, entry && strstr(entry, "ro")))
			return -1;
	}
	if (!flag(HOME) || spank_getenv(job, "HOME", home, sizeof home) != ESPANK_SUCCESS)
		return 0;
	return bind_into(home, home, false);
}

static bool host_wins(const char *name)
{
	char *entry, *list = given[ENV] ? strdup(given[ENV]) : NULL;
	while ((entry = strsep(&list, ",")))
		if (!strcmp(entry, name))
			return true;
	return false;
}

static void image_environment(spank_t job)
{
	char path[8192], line[8192];
	snprintf(path, sizeof path, "%s/etc/environment", root);
	FILE *file = fopen(path, "r");
	while (file && fgets(line, sizeof line, file)) {
		char *value = line, *name = strsep(&value, "=");
		if (value && !host_wins(name)) {
			value[strcspn(value, "\n")] = 0;
			spank_setenv(job, name, value, 1);
		}
	}
}

int slurm_spank_init(spank_t job, int count, char **arguments)
{
	for (int i = 0; i < count; i++) {
		if (!strncmp(arguments[i], "data=", 5))
			data = arguments[i] + 5;
		else if (!strncmp(arguments[i], "userland=", 9))
			userland = arguments[i] + 9;
	}
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_ALLOCATOR && spank_context() != S_CTX_REMOTE)
		return 0;
	for (struct spank_option *option = options; option->name; option++)
		if (spank_option_register(job, option) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

int slurm_spank_init_post_opt(spank_t job, int count, char **arguments)
{
	uint32_t id = 0, step = 0;
	if (spank_context() != S_CTX_REMOTE || !(given[IMAGE] || given[NAME]))
		return 0;
	kept = given[NAME] != NULL;
	spank_get_item(job, S_JOB_ID, &id);
	spank_get_item(job, S_JOB_STEPID, &step);
	if (kept)
		snprintf(root, sizeof root, "%s/pyxis_%.*s", data, (int)strcspn(given[NAME], ":"), given[NAME]);
	else
		snprintf(root, sizeof root, "%s/pyxis_%u.%u", data, id, step);
	return 0;
}

int slurm_spank_task_init_privileged(spank_t job, int count, char **arguments)
{
	if (!*root)
		return 0;
	if (access(root, F_OK)) {
		make(root, true);
		if (!given[IMAGE] || run((char *[]){"tar", "-xf", given[IMAGE], "-C", root, NULL}))
			return fail("cannot unpack", given[IMAGE] ? given[IMAGE] : "no image");
	}
	image_environment(job);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount(root, root, NULL, MS_BIND, NULL))
		return fail("no mount namespace with", root);
	if (all_mounts(job))
		return -1;
	if (!flag(WRITABLE) && mount(NULL, root, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return fail("cannot make read-only", root);
	if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH))
		return fail("cannot change root to", root);
	return 0;
}

int slurm_spank_task_init(spank_t job, int count, char **arguments) /* Slurm has gone to the step's folder since */
{
	const char *folder = given[WORKDIR] ? given[WORKDIR] : "/";
	return *root && chdir(folder) ? fail("no folder", folder) : 0;
}

int slurm_spank_exit(spank_t job, int count, char **arguments)
{
	if (spank_context() == S_CTX_REMOTE && *root && !kept)
		run((char *[]){"rm", "-rf", "--one-file-system", root, NULL});
	return 0;
}
