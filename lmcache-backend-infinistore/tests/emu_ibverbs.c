/* A software stand-in for an RDMA device, for tests on machines that have none: preloaded, it lets
 * unmodified programs that use libibverbs' reliable connections run on one host ("emulated NIC").
 *
 *     cc -O2 -shared -fPIC -o libemu_ibverbs.so emu_ibverbs.c -lpthread
 *     LD_PRELOAD=./libemu_ibverbs.so PROGRAM
 *
 * SEND and RECV travel over abstract Unix sockets, one for each queue pair. RDMA READ and WRITE are
 * done by a thread with process_vm_readv and process_vm_writev, so both ends run on this host as
 * the same user. Only what InfiniStore 0.2.35 uses is there: RC, one scatter-gather element,
 * completion channels; no shared receive queues, atomics, inline data or second port. It checks no
 * memory registration but a zero lkey. EMU_IBV_DEV names the device, mlx5_1 if not said.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>
#include <stddef.h>
#undef ibv_query_port
#undef ibv_reg_mr
#define LOG(...)                                                                                   \
    do {                                                                                           \
        if (getenv("EMU_IBV_DEBUG")) {                                                             \
            fprintf(stderr, "[emu_ibv %d] ", getpid());                                            \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
        }                                                                                          \
    } while (0)

struct ecq {
    struct ibv_cq cq;
    pthread_mutex_t m;
    struct ibv_wc *ring;
    int cap, head, n, armed;
    int wfd;
};

struct echan {
    struct ibv_comp_channel ch;
    int wfd;
};

struct rwr {
    uint64_t id;
    void *addr;
    uint32_t len;
    struct rwr *next;
};

struct swr {
    struct ibv_send_wr wr;
    struct ibv_sge sge;
    struct swr *next;
};

struct eqp {
    struct ibv_qp qp;
    pthread_mutex_t m;
    pthread_cond_t cv_r, cv_s;
    struct rwr *rh, *rt;
    struct swr *sh, *st;
    int lfd, out, in, stop;
    pid_t peer;
    pthread_t ta, tw;
    int run_a, run_w;
};

struct hdr {
    uint32_t len, imm;
    uint8_t has_imm;
};
static struct ibv_device dev;
static struct ibv_device *devs[2];
static pthread_mutex_t keym = PTHREAD_MUTEX_INITIALIZER;
static uint32_t nextkey = 100;

static void init_dev(void) {
    const char *n = getenv("EMU_IBV_DEV");
    strcpy(dev.name, n ? n : "mlx5_1");
    strcpy(dev.dev_name, "uverbs0");
    dev.node_type = IBV_NODE_CA;
    dev.transport_type = IBV_TRANSPORT_IB;
    devs[0] = &dev;
    devs[1] = NULL;
}

struct ibv_device **ibv_get_device_list(int *n) {
    init_dev();
    if (n)
        *n = 1;
    struct ibv_device **l = calloc(2, sizeof *l);
    l[0] = &dev;
    return l;
}

void ibv_free_device_list(struct ibv_device **l) {
    free(l);
}

const char *ibv_get_device_name(struct ibv_device *d) {
    return d->name;
}

static int e_poll(struct ibv_cq *c, int num, struct ibv_wc *wc) {
    struct ecq *q = (void *)c;
    int k = 0;
    pthread_mutex_lock(&q->m);
    while (k < num && q->n) {
        wc[k++] = q->ring[q->head];
        q->head = (q->head + 1) % q->cap;
        q->n--;
    }
    pthread_mutex_unlock(&q->m);
    return k;
}

static void fire(struct ecq *q) {
    if (q->wfd >= 0) {
        struct ecq *p = q;
        if (write(q->wfd, &p, sizeof p) < 0) {
        }
    }
}

// As a real CQ: a completion that is already there doesn't fire, only the next one.
static int e_notify(struct ibv_cq *c, int solicited) {
    struct ecq *q = (void *)c;
    (void)solicited;
    pthread_mutex_lock(&q->m);
    q->armed = 1;
    pthread_mutex_unlock(&q->m);
    return 0;
}

static void push(struct ibv_cq *c, struct ibv_wc w) {
    struct ecq *q = (void *)c;
    pthread_mutex_lock(&q->m);
    if (q->n == q->cap) {
        q->cap *= 2;
        struct ibv_wc *r = calloc(q->cap, sizeof *r);
        for (int i = 0; i < q->n; i++)
            r[i] = q->ring[(q->head + i) % (q->cap / 2)];
        free(q->ring);
        q->ring = r;
        q->head = 0;
    }
    q->ring[(q->head + q->n++) % q->cap] = w;
    if (q->armed) {
        q->armed = 0;
        fire(q);
    }
    pthread_mutex_unlock(&q->m);
}

static int wr_all(int fd, const void *p, size_t n) {
    const char *c = p;
    while (n) {
        ssize_t k = send(fd, c, n, MSG_NOSIGNAL);
        if (k <= 0) {
            if (k < 0 && errno == EINTR)
                continue;
            return -1;
        }
        c += k;
        n -= k;
    }
    return 0;
}

static int rd_all(int fd, void *p, size_t n) {
    char *c = p;
    while (n) {
        ssize_t k = recv(fd, c, n, MSG_WAITALL);
        if (k <= 0) {
            if (k < 0 && errno == EINTR)
                continue;
            return -1;
        }
        c += k;
        n -= k;
    }
    return 0;
}

static int vm(int wr, pid_t pid, void *l, void *r, size_t n) {
    size_t d = 0;
    while (d < n) {
        size_t c = n - d;
        struct iovec a = {(char *)l + d, c}, b = {(char *)r + d, c};
        ssize_t k =
            wr ? process_vm_writev(pid, &a, 1, &b, 1, 0) : process_vm_readv(pid, &a, 1, &b, 1, 0);
        if (k <= 0)
            return -1;
        d += k;
    }
    return 0;
}

// Whether the peer still has its end: its process number may be another one's by now.
static int there(struct eqp *q) {
    struct pollfd p = {.fd = q->out};
    return q->out >= 0 && poll(&p, 1, 0) >= 0 && !(p.revents & (POLLHUP | POLLERR));
}

static void *worker(void *p) {
    struct eqp *q = p;
    for (;;) {
        pthread_mutex_lock(&q->m);
        while (!q->sh && !q->stop)
            pthread_cond_wait(&q->cv_s, &q->m);
        if (q->stop) { // what is left is flushed: the peer may have other plans with its memory
            pthread_mutex_unlock(&q->m);
            return 0;
        }
        struct swr *s = q->sh;
        q->sh = s->next;
        if (!q->sh)
            q->st = 0;
        pthread_mutex_unlock(&q->m);
        struct ibv_wc w = {.wr_id = s->wr.wr_id,
                           .status = IBV_WC_SUCCESS,
                           .qp_num = q->qp.qp_num,
                           .byte_len = s->sge.length};
        int rc = 0;
        switch (s->wr.opcode) {
        case IBV_WR_SEND:
        case IBV_WR_SEND_WITH_IMM: {
            w.opcode = IBV_WC_SEND;
            if (s->wr.num_sge && s->sge.lkey == 0) {
                w.status = IBV_WC_LOC_PROT_ERR;
                break;
            }
            struct hdr h = {s->wr.num_sge ? s->sge.length : 0, s->wr.imm_data,
                            s->wr.opcode == IBV_WR_SEND_WITH_IMM};
            rc = q->out < 0 ? -1 : wr_all(q->out, &h, sizeof h);
            if (!rc && h.len)
                rc = wr_all(q->out, (void *)s->sge.addr, h.len);
            break;
        }
        case IBV_WR_RDMA_READ:
            w.opcode = IBV_WC_RDMA_READ;
            rc = there(q) ? vm(0, q->peer, (void *)s->sge.addr,
                               (void *)s->wr.wr.rdma.remote_addr, s->sge.length)
                          : -1;
            break;
        case IBV_WR_RDMA_WRITE:
            w.opcode = IBV_WC_RDMA_WRITE;
            rc = there(q) ? vm(1, q->peer, (void *)s->sge.addr,
                               (void *)s->wr.wr.rdma.remote_addr, s->sge.length)
                          : -1;
            break;
        default:
            rc = -1;
        }
        if (rc) {
            LOG("op %d failed: %s", s->wr.opcode, strerror(errno));
            w.status = IBV_WC_RETRY_EXC_ERR;
        }
        if ((s->wr.send_flags & IBV_SEND_SIGNALED) || w.status != IBV_WC_SUCCESS)
            push(q->qp.send_cq, w);
        free(s);
    }
}

static void *acceptor(void *p) {
    struct eqp *q = p;
    int in = accept4(q->lfd, 0, 0, SOCK_CLOEXEC);
    pthread_mutex_lock(&q->m);
    q->in = in;
    int stop = q->stop; // if it came after accept, q->in wasn't shut down
    pthread_mutex_unlock(&q->m);
    if (in < 0 || stop)
        return 0;
    for (;;) {
        struct hdr h;
        if (rd_all(q->in, &h, sizeof h))
            return 0;
        pthread_mutex_lock(&q->m);
        while (!q->rh && !q->stop)
            pthread_cond_wait(&q->cv_r, &q->m);
        if (q->stop) {
            pthread_mutex_unlock(&q->m);
            return 0;
        }
        struct rwr *r = q->rh;
        q->rh = r->next;
        if (!q->rh)
            q->rt = 0;
        pthread_mutex_unlock(&q->m);
        struct ibv_wc w = {.wr_id = r->id,
                           .status = IBV_WC_SUCCESS,
                           .opcode = IBV_WC_RECV,
                           .byte_len = h.len,
                           .imm_data = h.imm,
                           .wc_flags = h.has_imm ? IBV_WC_WITH_IMM : 0,
                           .qp_num = q->qp.qp_num};
        if (h.len > r->len) {
            w.status = IBV_WC_LOC_LEN_ERR;
            push(q->qp.recv_cq, w);
            free(r);
            return 0;
        }
        int rc = h.len ? rd_all(q->in, r->addr, h.len) : 0;
        free(r);
        if (rc)
            return 0;
        push(q->qp.recv_cq, w);
    }
}

static int e_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad) {
    struct eqp *q = (void *)qp;
    (void)bad;
    pthread_mutex_lock(&q->m);
    for (; wr; wr = wr->next) {
        struct swr *s = calloc(1, sizeof *s);
        s->wr = *wr;
        if (wr->num_sge)
            s->sge = wr->sg_list[0];
        if (q->st)
            q->st->next = s;
        else
            q->sh = s;
        q->st = s;
    }
    pthread_cond_signal(&q->cv_s);
    pthread_mutex_unlock(&q->m);
    return 0;
}

static int e_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad) {
    struct eqp *q = (void *)qp;
    (void)bad;
    pthread_mutex_lock(&q->m);
    for (; wr; wr = wr->next) {
        struct rwr *r = calloc(1, sizeof *r);
        r->id = wr->wr_id;
        if (wr->num_sge) {
            r->addr = (void *)wr->sg_list[0].addr;
            r->len = wr->sg_list[0].length;
        }
        if (q->rt)
            q->rt->next = r;
        else
            q->rh = r;
        q->rt = r;
    }
    pthread_cond_signal(&q->cv_r);
    pthread_mutex_unlock(&q->m);
    return 0;
}

struct ibv_context *ibv_open_device(struct ibv_device *d) {
    struct ibv_context *c = calloc(1, sizeof *c);
    c->device = d;
    c->ops.poll_cq = e_poll;
    c->ops.req_notify_cq = e_notify;
    c->ops.post_send = e_post_send;
    c->ops.post_recv = e_post_recv;
    c->cmd_fd = c->async_fd = -1;
    c->num_comp_vectors = 1;
    c->abi_compat = NULL;
    return c;
}

int ibv_close_device(struct ibv_context *c) {
    free(c);
    return 0;
}

int ibv_query_port(struct ibv_context *c, uint8_t p, struct _compat_ibv_port_attr *a) {
    (void)c;
    (void)p;
    struct ibv_port_attr t = {.state = IBV_PORT_ACTIVE,
                              .max_mtu = IBV_MTU_4096,
                              .active_mtu = IBV_MTU_4096,
                              .gid_tbl_len = 1,
                              .lid = 1,
                              .max_msg_sz = 1u << 30};
    t.link_layer = IBV_LINK_LAYER_INFINIBAND;
    memcpy(a, &t, offsetof(struct ibv_port_attr, port_cap_flags2));
    return 0;
}

int ibv_query_gid(struct ibv_context *c, uint8_t p, int i, union ibv_gid *g) {
    (void)c;
    (void)p;
    (void)i;
    memset(g, 0, sizeof *g);
    g->raw[10] = g->raw[11] = 0xff;
    g->raw[12] = 127;
    g->raw[15] = 1;
    g->global.subnet_prefix = 1;
    return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *c) {
    struct ibv_pd *p = calloc(1, sizeof *p);
    p->context = c;
    return p;
}

int ibv_dealloc_pd(struct ibv_pd *p) {
    free(p);
    return 0;
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *p, void *a, size_t l, int acc) {
    (void)acc;
    struct ibv_mr *m = calloc(1, sizeof *m);
    m->context = p->context;
    m->pd = p;
    m->addr = a;
    m->length = l;
    pthread_mutex_lock(&keym);
    m->lkey = m->rkey = nextkey++;
    pthread_mutex_unlock(&keym);
    return m;
}

int ibv_dereg_mr(struct ibv_mr *m) {
    free(m);
    return 0;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *c) {
    int p[2];
    if (pipe2(p, O_CLOEXEC))
        return 0;
    struct echan *e = calloc(1, sizeof *e);
    e->ch.context = c;
    e->ch.fd = p[0];
    e->wfd = p[1];
    return &e->ch;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *c) {
    struct echan *e = (void *)c;
    close(c->fd);
    close(e->wfd);
    free(e);
    return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *c, int n, void *ctx, struct ibv_comp_channel *ch,
                             int v) {
    (void)v;
    struct ecq *q = calloc(1, sizeof *q);
    q->cq.context = c;
    q->cq.channel = ch;
    q->cq.cq_context = ctx;
    q->cq.cqe = n;
    q->cap = n;
    q->ring = calloc(n, sizeof *q->ring);
    pthread_mutex_init(&q->m, 0);
    q->wfd = ch ? ((struct echan *)ch)->wfd : -1;
    return &q->cq;
}

int ibv_destroy_cq(struct ibv_cq *c) {
    struct ecq *q = (void *)c;
    free(q->ring);
    free(q);
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *ch, struct ibv_cq **cq, void **ctx) {
    struct ecq *q;
    ssize_t k = read(ch->fd, &q, sizeof q);
    if (k != sizeof q)
        return -1;
    *cq = &q->cq;
    *ctx = q->cq.cq_context;
    return 0;
}

void ibv_ack_cq_events(struct ibv_cq *c, unsigned n) {
    (void)c;
    (void)n;
}

static void nm(struct sockaddr_un *a, socklen_t *l, uint32_t qpn) {
    memset(a, 0, sizeof *a);
    a->sun_family = AF_UNIX;
    int k = snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "emu_ibv_%u", qpn);
    *l = offsetof(struct sockaddr_un, sun_path) + 1 + k;
}

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *a) {
    struct eqp *q = calloc(1, sizeof *q);
    q->qp.context = pd->context;
    q->qp.pd = pd;
    q->qp.send_cq = a->send_cq;
    q->qp.recv_cq = a->recv_cq;
    q->qp.qp_type = a->qp_type;
    q->out = q->in = -1;
    pthread_mutex_init(&q->m, 0);
    pthread_cond_init(&q->cv_r, 0);
    pthread_cond_init(&q->cv_s, 0);
    unsigned seed = getpid() * 2654435761u ^ (unsigned)(uintptr_t)q;
    struct sockaddr_un u;
    socklen_t l;
    q->lfd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    for (int i = 0; i < 100; i++) {
        q->qp.qp_num = rand_r(&seed) & 0xffffff;
        nm(&u, &l, q->qp.qp_num);
        if (!bind(q->lfd, (void *)&u, l))
            break;
    }
    if (listen(q->lfd, 1)) {
        free(q);
        return 0;
    }
    q->run_a = !pthread_create(&q->ta, 0, acceptor, q);
    q->run_w = !pthread_create(&q->tw, 0, worker, q);
    return &q->qp;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask) {
    struct eqp *q = (void *)qp;
    if (!(mask & IBV_QP_STATE))
        return 0;
    qp->state = a->qp_state;
    if (a->qp_state == IBV_QPS_RTR) {
        struct sockaddr_un u;
        socklen_t l;
        nm(&u, &l, a->dest_qp_num);
        q->out = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(q->out, (void *)&u, l))
            return errno;
        struct ucred c;
        socklen_t cl = sizeof c;
        if (getsockopt(q->out, SOL_SOCKET, SO_PEERCRED, &c, &cl))
            return errno;
        q->peer = c.pid;
        LOG("qp %u -> %u pid %d", qp->qp_num, a->dest_qp_num, q->peer);
    }
    if (a->qp_state == IBV_QPS_RESET || a->qp_state == IBV_QPS_ERR) {
        pthread_mutex_lock(&q->m);
        q->stop = 1;
        pthread_cond_broadcast(&q->cv_r);
        pthread_cond_broadcast(&q->cv_s);
        shutdown(q->lfd, SHUT_RDWR);
        if (q->in >= 0)
            shutdown(q->in, SHUT_RDWR);
        if (q->out >= 0)
            shutdown(q->out, SHUT_RDWR);
        pthread_mutex_unlock(&q->m);
    }
    return 0;
}

int ibv_destroy_qp(struct ibv_qp *qp) {
    struct eqp *q = (void *)qp;
    struct ibv_qp_attr a = {.qp_state = IBV_QPS_RESET};
    ibv_modify_qp(qp, &a, IBV_QP_STATE);
    if (q->run_a)
        pthread_join(q->ta, 0);
    if (q->run_w)
        pthread_join(q->tw, 0);
    close(q->lfd);
    if (q->in >= 0)
        close(q->in);
    if (q->out >= 0)
        close(q->out);
    for (struct rwr *r = q->rh, *next; r; r = next) {
        next = r->next;
        free(r);
    }
    for (struct swr *s = q->sh, *next; s; s = next) {
        next = s->next;
        free(s);
    }
    free(q);
    return 0;
}

const char *ibv_wc_status_str(enum ibv_wc_status s) {
    static __thread char b[32];
    snprintf(b, sizeof b, "wc status %d", s);
    return b;
}
